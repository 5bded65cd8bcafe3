"""Where a piece stands between the blocks and the wire, and the stream that copies it.

One buffer per link direction, used by that direction's thread only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch

from tandem.transfer.types import KVBlocks, Piece


class PieceBuffer:
    """A reused contiguous buffer, grown to the largest piece seen.

    Copies run beside the model: inline on the CPU, on a stream of their own on CUDA. They are
    complete when the method returns. A returned tensor is valid until the next call.
    """

    def __init__(self, blocks: KVBlocks) -> None:
        self._blocks = blocks
        self._device = blocks.kv.device
        self._tail = tuple(blocks.kv.shape[-2:])  # of the heads that this link carries
        self._bytes = torch.empty(1, dtype=torch.uint8, device=self._device)
        self._shape: tuple[int, ...] = (0,)
        self._stream = (
            torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if self._device.type == "cuda"
            else None
        )

    def probe(self) -> torch.Tensor:
        """One byte, for the wire."""
        return self._bytes[:1]

    def make_room(self, num_layers: int, num_tokens: int) -> torch.Tensor:
        """The bytes of a piece of this size, for the wire."""
        self._shape = (num_layers, 2, num_tokens, *self._tail)
        nbytes = prod(self._shape) * self._blocks.kv.dtype.itemsize
        if self._bytes.numel() < nbytes:
            self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return self._bytes[:nbytes]

    def pack(self, piece: Piece) -> torch.Tensor:
        """Copy a piece out of its blocks once it is ready; its bytes, for the wire."""
        wire = self.make_room(piece.num_layers, len(piece.slots))
        with self._copying(piece.ready):
            self._blocks.pack(piece.first_layer, piece.num_layers, piece.slots, self._view())
        return wire

    def unpack(
        self, first_layer: int, num_layers: int, slots: torch.Tensor, after: torch.cuda.Event | None
    ) -> None:
        """Copy what was received since `make_room` into blocks, once `after` has happened."""
        with self._copying(after):
            self._blocks.unpack(first_layer, num_layers, slots, self._view())

    def _view(self) -> torch.Tensor:
        """The buffer as [num_layers, 2, num_tokens, num_kv_heads, head_dim]."""
        dtype = self._blocks.kv.dtype
        return self._bytes[: prod(self._shape) * dtype.itemsize].view(dtype).view(self._shape)

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
