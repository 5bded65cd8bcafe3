"""Rotary embedding of an iteration's queries and keys, and writing its keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_kernels.kv_write import kv_write
from tandem_kernels.rotary import apply_rotary


def rotary_kv_write(
    heads: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Return the rotated queries, [tokens, heads, head_dim]; write rotated keys and values at
    `slots`.

    heads: [tokens, heads + kv_heads, head_dim], the queries and then the keys; value: [tokens,
    kv_heads, head_dim]; cos, sin: as `rotary_tables` returns them; caches: [num_blocks, block_size,
    kv_heads, head_dim], changed in place; slots: int64 [tokens], none twice.
    """
    kv_heads = value.shape[1]
    rotated = apply_rotary(heads, cos, sin)
    query, key = torch.split(rotated, [heads.shape[1] - kv_heads, kv_heads], dim=1)
    kv_write(key_cache, value_cache, slots, key, value)
    return query
