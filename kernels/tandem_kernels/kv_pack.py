"""Gather the KV of some tokens and layers into one contiguous buffer, and scatter it back.

What a transfer sends: few large buffers in place of many small rows.
"""

from __future__ import annotations

from torch import Tensor


def kv_pack(
    kv: Tensor, first_layer: int, num_layers: int, slots: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return a contiguous [num_layers, 2, len(slots), kv_heads, head_dim] copy of the KV at
    `slots`.

    kv: [layers, 2, num_blocks, block_size, kv_heads, head_dim], of any strides; slots: int64 on
    kv's device. `out`, if given, is filled and returned.
    """
    block, offset = slots // kv.shape[3], slots % kv.shape[3]
    packed = kv[first_layer : first_layer + num_layers, :, block, offset]
    return packed if out is None else out.copy_(packed)


def kv_unpack(
    kv: Tensor, first_layer: int, num_layers: int, slots: Tensor, staging: Tensor
) -> None:
    """Write a packed buffer, shaped as `kv_pack` returns it, into the slots in place."""
    block, offset = slots // kv.shape[3], slots % kv.shape[3]
    kv[first_layer : first_layer + num_layers, :, block, offset] = staging
