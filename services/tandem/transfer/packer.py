"""Copies pieces out of their blocks and keeps them staged until the peer has acknowledged them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from tandem.tracing.buffer import PieceRef
from tandem.transfer import messages
from tandem.transfer.context import LinkContext
from tandem.transfer.group import LinkGroup, Transfer
from tandem.transfer.send_ledger import Outgoing
from tandem.transfer.staging import Region, StagingRing
from tandem.transfer.types import Piece


class _Packed(NamedTuple):
    ref: PieceRef
    began: float
    packed: float


@dataclass(slots=True)
class _Departure:
    """Pieces that share one send."""

    region: Region
    pieces: list[_Packed] = field(default_factory=list)
    last_number: int = 0
    transfer: Transfer | None = None
    posted: float = 0.0


class Packer:
    """What is on its way, oldest first. Used by the link's thread only."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._ring = StagingRing(context.blocks, context.backend)
        self._filling: _Departure | None = None
        self._departures: deque[_Departure] = deque()
        self._arrived_at = 0.0

    def probe(self) -> torch.Tensor:
        """One byte, for the wire."""
        return self._ring.probe()

    def has_room(self, piece: Piece) -> bool:
        """Whether a piece may go ahead of the acknowledgements that are still to come."""
        return self._ring.has_room(self._ring.nbytes(piece.num_layers, len(piece.slots)))

    def may_join(self, piece: Piece) -> bool:
        """Whether a piece can be packed behind those of the next send, without waiting."""
        if self._filling is None:
            return False
        if piece.ready is not None and not piece.ready.query():  # type: ignore[no-untyped-call]
            return False
        nbytes = self._ring.nbytes(piece.num_layers, len(piece.slots))
        return self._ring.has_room_behind(self._filling.region, nbytes)

    def pack(self, outgoing: Outgoing) -> None:
        """Copy a piece into the next send once it is ready; there must be room.

        Raises what the copy raises.
        """
        piece, began = outgoing.piece, time.monotonic()
        nbytes = self._ring.nbytes(piece.num_layers, len(piece.slots))
        departure = self._filling or _Departure(self._ring.take(nbytes))
        region = departure.region
        start = region.end if departure.pieces else region.start
        try:
            staged = self._ring.staged(start, piece.num_layers, len(piece.slots))
            self._ring.pack(piece.first_layer, piece.slots, staged, piece.ready)
        except Exception:
            if not departure.pieces:
                self._ring.take_back()
            raise
        region.end = start + nbytes
        departure.pieces.append(_Packed(messages.ref(piece), began, time.monotonic()))
        departure.last_number = outgoing.sequence_number
        self._filling = departure

    def send(self, group: LinkGroup) -> None:
        """Put what was packed on the wire, behind what went before it, and return."""
        departure, self._filling = self._filling, None
        if departure is None:
            return
        self._departures.append(departure)
        wire = self._ring.wire(departure.region)
        departure.posted = time.monotonic()
        departure.transfer = group.post_send(wire)
        context = self._context
        context.counters.sent(wire.numel(), len(departure.pieces))
        for ref, began, packed in departure.pieces:
            context.trace.sent(context.peer_name, ref, began, packed, departure.posted)

    def acknowledged(self, sequence_number: int) -> None:
        """The peer has every piece up to this one: their staging is free. Raises `LinkError`."""
        context, now = self._context, time.monotonic()
        while self._departures and self._departures[0].last_number <= sequence_number:
            departure = self._departures.popleft()
            if departure.transfer is not None:
                departure.transfer.wait(context.config.transfer_timeout)
            self._ring.give_back()
            context.counters.acknowledged(max(0.0, now - max(departure.posted, self._arrived_at)))
            self._arrived_at = now

    def discard(self) -> None:
        """The epoch is over: forget what is on its way; the ledger sends it again."""
        self._filling = None
        self._departures.clear()
        self._ring.discard()
