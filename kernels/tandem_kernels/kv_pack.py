"""Gather the KV of some tokens and layers into one contiguous buffer, and scatter it back.

What a transfer sends: few large buffers in place of many small rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kv_pack(
    kv: Tensor, first_layer: int, num_layers: int, slots: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return a contiguous [num_layers, 2, len(slots), kv_heads, head_dim] copy of the KV at
    `slots`.

    kv: [layers, 2, num_blocks, block_size, kv_heads, head_dim]; slots: int64 on kv's device.
    `out`, if given, is filled and returned.
    """
    layers = kv[first_layer : first_layer + num_layers].flatten(2, 3)
    if out is None:
        return layers.index_select(2, slots)
    return torch.index_select(layers, 2, slots, out=out)


def kv_unpack(
    kv: Tensor, first_layer: int, num_layers: int, slots: Tensor, staging: Tensor
) -> None:
    """Write a packed buffer, shaped as `kv_pack` returns it, into the slots in place."""
    kv[first_layer : first_layer + num_layers].flatten(2, 3).index_copy_(2, slots, staging)
