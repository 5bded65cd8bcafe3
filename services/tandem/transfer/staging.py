"""Where pieces stand between the blocks and the wire, and the stream that copies them.

One ring per link direction, used by that direction's thread only. Pieces come and go in order, so
their staging is one bounded buffer, used round and round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch

from tandem.transfer.types import KVBlocks
from tandem.v1 import worker_pb2

MAX_PIECES = 16
"""Pieces that one direction of a link has between the blocks and the peer's blocks."""
_PIECES_AHEAD = 8
_AHEAD_BYTES = 4 << 20
"""Room is made for 8 pieces or 4 MiB, whichever is less, but always for 2 pieces: one is copied
while the other is on the wire. More than that a wire needs only to hide the latency of control
messages, and 4 MiB take longer than those."""
_ALIGNMENT = 64


class Region(NamedTuple):
    """A piece's place in the ring."""

    wire: torch.Tensor
    """Its bytes, uint8, contiguous."""
    staged: torch.Tensor
    """The same as [num_layers, 2, num_tokens, num_kv_heads, head_dim]."""


class StagingRing:
    """A bounded buffer whose regions are taken and given back in order.

    It grows with the largest piece seen, when it is empty. Copies run beside the model: inline on
    the CPU, on a stream of their own on CUDA; they are complete when the method returns. Where KV
    is on a GPU and the wire is not, the ring is pinned host memory.
    """

    def __init__(self, blocks: KVBlocks, spec: worker_pb2.KVSpec) -> None:
        self._blocks = blocks
        self._device = blocks.kv.device
        self._on_host = self._device.type == "cuda" and spec.backend == "gloo"
        self._tail = (spec.num_kv_heads, spec.head_dim)
        self._bytes = self._allocate(_ALIGNMENT)
        self._taken: deque[tuple[int, int]] = deque()
        self._stream = (
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if self._device.type == "cuda"
            else None
        )

    def probe(self) -> torch.Tensor:
        """One byte, for the wire; only while the ring is empty."""
        return self._bytes[:1]

    def has_room(self, num_layers: int, num_tokens: int) -> bool:
        """Whether a piece of this size can be staged now. Always true while the ring is empty."""
        if not self._taken:
            return True
        return len(self._taken) < MAX_PIECES and self._find(self._size(num_layers, num_tokens)) >= 0

    def take(self, num_layers: int, num_tokens: int) -> Region:
        """Take the next region; there must be room."""
        nbytes = self._size(num_layers, num_tokens)
        if not self._taken and self._bytes.numel() < 2 * _aligned(nbytes):
            room = max(2, min(_PIECES_AHEAD, _AHEAD_BYTES // _aligned(nbytes)))
            self._bytes = self._allocate(room * _aligned(nbytes))
        start = self._find(nbytes)
        if start < 0:
            raise RuntimeError("a piece was staged without room for it")
        self._taken.append((start, start + _aligned(nbytes)))
        wire = self._bytes[start : start + nbytes]
        shape = (num_layers, 2, num_tokens, *self._tail)
        return Region(wire, wire.view(self._blocks.kv.dtype).view(shape))

    def give_back(self) -> None:
        """The oldest region is free again."""
        self._taken.popleft()

    def take_back(self) -> None:
        """The region that was taken last is not used."""
        self._taken.pop()

    def discard(self) -> None:
        """Start anew. What is taken is left to its group, which may write to it a last time."""
        if self._taken:
            self._taken.clear()
            self._bytes = self._allocate(self._bytes.numel())

    def pack(
        self, first_layer: int, slots: torch.Tensor, region: Region, ready: torch.cuda.Event | None
    ) -> None:
        """Copy a piece out of its blocks, once `ready` has happened."""
        num_layers = len(region.staged)
        with self._copying(ready):
            if self._on_host:
                packed = self._blocks.pack(first_layer, num_layers, slots)
                region.staged.copy_(packed, non_blocking=True)
            else:
                self._blocks.pack(first_layer, num_layers, slots, region.staged)

    def unpack(
        self, first_layer: int, slots: torch.Tensor, region: Region, after: torch.cuda.Event | None
    ) -> None:
        """Copy what was received into blocks, once `after` has happened."""
        with self._copying(after):
            staged = region.staged.to(self._device, non_blocking=True)
            self._blocks.unpack(first_layer, len(staged), slots, staged)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if self._on_host:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _size(self, num_layers: int, num_tokens: int) -> int:
        return prod((num_layers, 2, num_tokens, *self._tail)) * self._blocks.kv.dtype.itemsize

    def _find(self, nbytes: int) -> int:
        """Where a region of this size fits, or -1."""
        if not self._taken:
            return 0 if nbytes <= self._bytes.numel() else -1
        (first, _), (last, end) = self._taken[0], self._taken[-1]
        if last < first:  # it has wrapped: what is free lies between the newest and the oldest
            return end if end + nbytes <= first else -1
        if end + nbytes <= self._bytes.numel():
            return end
        return 0 if nbytes <= first else -1

    @contextmanager
    def _copying(self, after: torch.cuda.Event | None) -> Iterator[None]:
        # Inference mode, because the engine may have made the blocks in it.
        if self._stream is None:
            with torch.inference_mode():
                yield
            return
        with (
            torch.inference_mode(),
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
        ):
            if after is not None:
                self._stream.wait_event(after)
            yield
        self._stream.synchronize()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
