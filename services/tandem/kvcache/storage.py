"""The tensors that hold keys and values. Knows blocks and slots; not who owns them (`block_pool`).

One tensor holds every layer, so that any layer range of any tokens can be packed for a transfer in
one operation. A slot is the place of one token: `block * block_size + offset`.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from tandem_kernels import kv_pack, kv_unpack

COPY_BLOCKS = 32
"""Blocks that a copy between the tiers stages on the device at once."""


class KVStorage:
    """KV of `num_blocks` blocks: `kv` [num_layers, 2, num_blocks, block_size, num_kv_heads,
    head_dim].

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
        # Zeros: masked keys count for nothing, but only if what is masked is a finite number.
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        self.kv = _zeros(shape, dtype, torch.device(device))
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = self.kv.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV that one token takes over all layers."""
        return bytes_per_token(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype)

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
    """KV of blocks in host memory: `kv` [num_blocks, num_layers, 2, block_size, num_kv_heads,
    head_dim], so that a block is one run of bytes. Pinned where the device is CUDA.

    Copies leave the device in the order of the current stream; on CPUs they are done on return.
    """

    def __init__(self, device: KVStorage, num_blocks: int) -> None:
        layers, two, _, *block = device.kv.shape
        self._device_kv = device.kv
        self._is_cuda = device.device.type == "cuda"
        self.num_blocks = num_blocks
        self.kv = torch.empty(
            (num_blocks, layers, two, *block), dtype=device.dtype, pin_memory=self._is_cuda
        )

    def copy_out(self, device_blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy blocks of the device, up to `COPY_BLOCKS` of which are staged there at a time."""
        for start in range(0, len(device_blocks), COPY_BLOCKS):
            index = self._index(device_blocks[start : start + COPY_BLOCKS])
            staged = self._device_kv.index_select(2, index).permute(2, 0, 1, 3, 4, 5).contiguous()
            for row, block in zip(staged, host_blocks[start : start + COPY_BLOCKS], strict=True):
                self.kv[block].copy_(row, non_blocking=True)

    def copy_in(self, host_blocks: Sequence[int], device_blocks: Sequence[int]) -> None:
        """Copy blocks to the device, staged as in `copy_out`."""
        for start in range(0, len(host_blocks), COPY_BLOCKS):
            chosen = host_blocks[start : start + COPY_BLOCKS]
            staged = torch.empty(
                (len(chosen), *self.kv.shape[1:]),
                dtype=self.kv.dtype,
                device=self._device_kv.device,
            )
            for row, block in zip(staged, chosen, strict=True):
                row.copy_(self.kv[block], non_blocking=True)
            index = self._index(device_blocks[start : start + COPY_BLOCKS])
            self._device_kv.index_copy_(2, index, staged.permute(1, 2, 0, 3, 4, 5))

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._device_kv.device)


def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return the bytes of KV that one token takes over all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
