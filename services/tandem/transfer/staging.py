"""Where a piece stands between the blocks and the wire, and the stream that copies it.

One staging buffer and one copy lane per link direction, used by that direction's thread only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch

from tandem.v1 import worker_pb2


class Staging:
    """A reused contiguous buffer, grown to the largest piece seen."""

    def __init__(self, spec: worker_pb2.KVSpec, device: torch.device) -> None:
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._tail = (spec.num_kv_heads, spec.head_dim)
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, num_layers: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same memory twice: as bytes for the wire, and as [num_layers, 2, num_tokens,
        num_kv_heads, head_dim] for the blocks. Valid until the next call.
        """
        shape = (num_layers, 2, num_tokens, *self._tail)
        wire = self.take_bytes(prod(shape) * self._dtype.itemsize)
        return wire, wire.view(self._dtype).view(shape)

    def take_bytes(self, nbytes: int) -> torch.Tensor:
        """The first bytes of the buffer."""
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return self._buffer[:nbytes]


class CopyLane:
    """Runs pack and unpack beside the model: inline on the CPU, on an own stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )

    @contextmanager
    def copying(self, after: torch.cuda.Event | None) -> Iterator[None]:
        """Copies made inside start when `after` has happened and are complete on leaving."""
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
