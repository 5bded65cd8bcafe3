"""Scatter the keys and values of an iteration's tokens into their cache slots."""

from __future__ import annotations

from torch import Tensor


def kv_write(
    key_cache: Tensor, value_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor
) -> None:
    """Write key and value, [tokens, kv_heads, head_dim], at `slots`, int64 [tokens], in place.

    Caches: [num_blocks, block_size, kv_heads, head_dim], of any block stride. A slot is `block *
    block_size + offset`; no slot may occur twice.
    """
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, offset] = key
    value_cache[block, offset] = value
