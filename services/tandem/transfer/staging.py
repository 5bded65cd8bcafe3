"""Where pieces stand between the blocks and the wire, and the stream that copies them.

One ring per link direction, used by that direction's thread only. Pieces come and go in order, so
their staging is one bounded buffer, used round and round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch

from tandem.transfer.spec import Backend
from tandem.transfer.types import KVBlocks

MAX_SENDS = 16
"""Sends that one direction of a link has between the blocks and the peer's blocks."""
_PIECES_AHEAD = 64
_AHEAD_BYTES = 4 << 20
"""Room is made for 64 pieces or 4 MiB, whichever is less, but always for 2 pieces: one is copied
while the other is on the wire. More than that a wire needs only to hide the latency of control
messages, and 4 MiB take longer than those."""
_ALIGNMENT = 64


@dataclass(slots=True, eq=False)
class Region:
    """The place of one send in the ring; it may hold several pieces, one behind the other."""

    start: int
    end: int


class StagingRing:
    """A bounded buffer whose regions are taken and given back in order.

    It grows with what is asked for, when it is empty. Copies run beside the model:
    inline on the CPU, on a stream of their own on CUDA; they are complete when the method returns.
    Where KV is on a GPU and the wire is not, the ring is pinned host memory.
    """

    def __init__(self, blocks: KVBlocks, backend: Backend) -> None:
        self._blocks = blocks
        self._device = blocks.kv.device
        self._on_host = self._device.type == "cuda" and backend == "gloo"
        self._tail = tuple(blocks.kv.shape[-2:])  # of the heads that this link carries
        self._bytes = self._allocate(_ALIGNMENT)
        self._taken: deque[Region] = deque()
        self._stream = (
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if self._device.type == "cuda"
            else None
        )

    def probe(self) -> torch.Tensor:
        """One byte, for the wire; only while the ring is empty."""
        return self._bytes[:1]

    def nbytes(self, num_layers: int, num_tokens: int) -> int:
        """What a piece takes, in bytes."""
        return prod((num_layers, 2, num_tokens, *self._tail)) * self._blocks.kv.dtype.itemsize

    def has_room(self, nbytes: int) -> bool:
        """Whether a region of this size can be taken now. Always true while the ring is empty."""
        if not self._taken:
            return True
        return len(self._taken) < MAX_SENDS and self._find(nbytes) >= 0

    def take(self, nbytes: int) -> Region:
        """Take the next region; there must be room."""
        room = _aligned(nbytes) * max(2, min(_PIECES_AHEAD, _AHEAD_BYTES // _aligned(nbytes)))
        if not self._taken and self._bytes.numel() < room:
            self._bytes = self._allocate(room)
        start = self._find(nbytes)
        if start < 0:
            raise RuntimeError("KV was staged without room for it")
        self._taken.append(Region(start, start + nbytes))
        return self._taken[-1]

    def has_room_behind(self, region: Region, nbytes: int) -> bool:
        """Whether the newest region may grow: to a quarter of the ring, so that several fit."""
        size = region.end + nbytes - region.start
        oldest = self._taken[0].start
        limit = oldest if oldest > region.start else self._bytes.numel()
        return 4 * size <= self._bytes.numel() and region.end + nbytes <= limit

    def give_back(self) -> None:
        """The oldest region is free again."""
        self._taken.popleft()

    def take_back(self) -> None:
        """The newest region is not used."""
        self._taken.pop()

    def wire(self, region: Region) -> torch.Tensor:
        """A region's bytes: uint8, contiguous."""
        return self._bytes[region.start : region.end]

    def staged(self, start: int, num_layers: int, num_tokens: int) -> torch.Tensor:
        """A piece's bytes from `start` on: [num_layers, 2, num_tokens, num_kv_heads, head_dim]."""
        wire = self._bytes[start : start + self.nbytes(num_layers, num_tokens)]
        return wire.view(self._blocks.kv.dtype).view(num_layers, 2, num_tokens, *self._tail)

    def discard(self) -> None:
        """Start anew. What is taken is left to its group, which may write to it a last time."""
        if self._taken:
            self._taken.clear()
            self._bytes = self._allocate(self._bytes.numel())

    def pack(
        self,
        first_layer: int,
        slots: torch.Tensor,
        staged: torch.Tensor,
        ready: torch.cuda.Event | None,
    ) -> None:
        """Copy a piece out of its blocks, once `ready` has happened."""
        with self._copying(ready):
            self._blocks.pack(first_layer, len(staged), slots, staged)

    def unpack(
        self,
        first_layer: int,
        slots: torch.Tensor,
        staged: torch.Tensor,
        after: torch.cuda.Event | None,
    ) -> None:
        """Copy what was received into blocks, once `after` has happened."""
        with self._copying(after):
            self._blocks.unpack(first_layer, len(staged), slots, staged)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        if self._on_host:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _find(self, nbytes: int) -> int:
        """Where a region of this size fits, or -1."""
        if not self._taken:
            return 0 if nbytes <= self._bytes.numel() else -1
        first, end = self._taken[0].start, _aligned(self._taken[-1].end)
        if self._taken[-1].start < first:  # wrapped: what is free lies before the oldest
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
