"""Scatter the keys and values of an iteration's tokens into their cache slots."""

from __future__ import annotations

from torch import Tensor


def kv_write(
    key_cache: Tensor, value_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor
) -> None:
    """Write key and value, [tokens, kv_heads, head_dim], at `slots`, int64 [tokens], in place.

    Caches: [num_blocks, block_size, kv_heads, head_dim]. A slot is `block * block_size + offset`;
    no slot may occur twice.
    """
    key_cache.flatten(0, 1).index_copy_(0, slots, key)
    value_cache.flatten(0, 1).index_copy_(0, slots, value)
