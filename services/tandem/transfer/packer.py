"""Copies pieces out of their blocks and puts them on the wire, one packed ahead of the other."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from tandem.tracing.buffer import PieceRef
from tandem.transfer import messages
from tandem.transfer.context import LinkContext
from tandem.transfer.group import LinkGroup
from tandem.transfer.staging import PieceBuffer
from tandem.transfer.types import Piece


class Packed(NamedTuple):
    """A piece that waits for the wire, and when it was packed."""

    ref: PieceRef
    wire: torch.Tensor
    began: float
    packed: float


class Packer:
    """Two staging buffers: one piece may be on the wire while the next is packed.

    So what `pack` returns is valid until `pack` has been called twice more. Used by the link's
    thread only.
    """

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._buffers = [PieceBuffer(context.blocks) for _ in range(2)]

    def probe(self) -> torch.Tensor:
        """One byte, for the wire."""
        return self._buffers[0].probe()

    def pack(self, piece: Piece) -> Packed:
        """Copy a piece once it is ready. Raises what the copy raises."""
        began = time.monotonic()
        self._buffers.reverse()
        wire = self._buffers[0].pack(piece)
        return Packed(messages.ref(piece), wire, began, time.monotonic())

    def send(self, packed: Packed, group: LinkGroup) -> None:
        """Put an announced piece on the wire; returns when the peer has it. Raises `LinkError`."""
        context, started = self._context, time.monotonic()
        group.send(packed.wire, context.config.transfer_timeout)
        context.counters.sent(packed.wire.numel(), time.monotonic() - started)
        context.trace.sent(context.peer_name, packed.ref, packed.began, packed.packed, started)
