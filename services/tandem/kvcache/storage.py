"""The tensors that hold keys and values. Knows blocks and slots; not who owns them (`block_pool`).

One tensor holds every layer, so that any layer range of any tokens can be packed for a transfer in
one operation. A block is one run of bytes over all layers: one copy takes it to host memory, and
memory that is first written comes a few blocks at a time, not a page for each layer at once. A slot
is the place of one token: `block * block_size + offset`.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from tandem_kernels import kv_pack, kv_unpack

_CACHE_LINE = 64
"""Bytes between two blocks on a CPU. The blocks of one layer would lie a multiple of a large power
of two apart otherwise, and compete for the same places in the caches: decode with long contexts
reads up to a tenth faster so (docs/kernels.md)."""


class KVStorage:
    """KV of `num_blocks` blocks: `blocks` [num_blocks, num_layers, 2, block_size, num_kv_heads,
    head_dim], each block contiguous, and `kv`, the same [num_layers, 2, num_blocks, ...].

    Different threads may read and write different slots at once; who may touch which slot is the
    block pool's decision.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        device = torch.device(device)
        stride = bytes_per_block(num_layers, block_size, num_kv_heads, head_dim, dtype, device)
        # Zeros: masked keys count for nothing, but only if what is masked is a finite number.
        self.memory = _zeros((num_blocks, stride // dtype.itemsize), dtype, device)
        shape = (num_layers, 2, block_size, num_kv_heads, head_dim)
        self.blocks = self.memory[:, : prod(shape)].view(num_blocks, *shape)
        self.kv = self.blocks.permute(1, 2, 0, 3, 4, 5)
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = self.memory.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV that one token takes over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of one layer, each [num_blocks, block_size, num_kv_heads,
        head_dim]."""
        return self.kv[index, 0], self.kv[index, 1]

    def slots(self, block_table: Sequence[int], start: int, end: int) -> Tensor:
        """Return the slots of tokens [start, end) of a sequence, int64 [end - start]."""
        positions = np.arange(start, end)  # a third of what torch takes for so little
        blocks = np.array(block_table[: -(-end // self.block_size)], dtype=np.int64)
        slots = blocks[positions // self.block_size] * self.block_size + positions % self.block_size
        return torch.from_numpy(slots).to(self.device)

    def pack(
        self, first_layer: int, num_layers: int, slots: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Return a contiguous copy, [num_layers, 2, len(slots), num_kv_heads, head_dim].

        `out` may lie in host memory while the blocks are on a device; the copy is then queued.
        """
        if out is not None and out.device != self.device:
            packed = kv_pack(self.kv, first_layer, num_layers, slots)
            return out.copy_(packed, non_blocking=True)
        return kv_pack(self.kv, first_layer, num_layers, slots, out)

    def unpack(self, first_layer: int, num_layers: int, slots: Tensor, staging: Tensor) -> None:
        """Write a packed buffer, which may lie in host memory, into the slots."""
        staging = staging.to(self.device, non_blocking=True)
        kv_unpack(self.kv, first_layer, num_layers, slots, staging)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take no memory before they are first written: the kernel gives pages of
    zeros, where torch would write them all, gigabytes at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=prod(shape)).view(shape)


class HostStorage:
    """KV of blocks in host memory: `blocks`, shaped as the device's. Pinned where that is CUDA.

    Copies leave the device in the order of the current stream; on CPUs they are done on return.
    """

    def __init__(self, device: KVStorage, num_blocks: int) -> None:
        self._device_blocks = device.blocks
        self.num_blocks = num_blocks
        shape = (num_blocks, *device.blocks.shape[1:])
        is_cuda = device.device.type == "cuda"
        self.blocks = torch.empty(shape, dtype=device.dtype, pin_memory=is_cuda)

    def copy_out(self, device_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy blocks of the device to blocks here, one to one."""
        for source, target in zip(device_blocks, host_blocks, strict=True):
            self.blocks[target].copy_(self._device_blocks[source], non_blocking=True)

    def copy_in(self, host_blocks: Sequence[int], device_blocks: Sequence[int]) -> None:
        """Copy blocks from here to blocks of the device, one to one."""
        for source, target in zip(host_blocks, device_blocks, strict=True):
            self._device_blocks[target].copy_(self.blocks[source], non_blocking=True)


def bytes_per_block(
    num_layers: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Return the bytes from one block of a `KVStorage` to the next."""
    numbers = 2 * num_layers * block_size * num_kv_heads * head_dim
    return numbers * dtype.itemsize + (_CACHE_LINE if device.type == "cpu" else 0)
