"""Copies pieces out of their blocks and keeps them staged until the peer has acknowledged them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

from tandem.tracing.buffer import PieceRef
from tandem.transfer import messages
from tandem.transfer.context import LinkContext
from tandem.transfer.group import LinkGroup, Transfer
from tandem.transfer.send_ledger import Outgoing
from tandem.transfer.staging import Region, StagingRing
from tandem.transfer.types import Piece


@dataclass(slots=True)
class _Departure:
    sequence_number: int
    ref: PieceRef
    region: Region
    began: float
    packed: float
    transfer: Transfer | None = None
    posted: float = 0.0


class Packer:
    """What is on its way, oldest first. Used by the link's thread only."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._ring = StagingRing(context.blocks, context.spec)
        self._departures: deque[_Departure] = deque()
        self._arrived_at = 0.0

    def probe(self) -> torch.Tensor:
        """One byte, for the wire."""
        return self._ring.probe()

    def has_room(self, piece: Piece) -> bool:
        """Whether a piece may go ahead of the acknowledgements that are still to come."""
        return self._ring.has_room(piece.num_layers, len(piece.slots))

    def pack(self, outgoing: Outgoing) -> None:
        """Copy a piece once it is ready; there must be room. Raises what the copy raises."""
        piece, began = outgoing.piece, time.monotonic()
        region = self._ring.take(piece.num_layers, len(piece.slots))
        try:
            self._ring.pack(piece.first_layer, piece.slots, region, piece.ready)
        except Exception:
            self._ring.take_back()
            raise
        self._departures.append(
            _Departure(
                outgoing.sequence_number, messages.ref(piece), region, began, time.monotonic()
            )
        )

    def send(self, group: LinkGroup) -> None:
        """Put the piece that was packed last on the wire, behind those before it, and return."""
        departure = self._departures[-1]
        departure.posted = time.monotonic()
        departure.transfer = group.post_send(departure.region.wire)
        self._context.counters.sent(departure.region.wire.numel())

    def acknowledged(self, sequence_number: int) -> None:
        """The peer has every piece up to this one: their staging is free. Raises `LinkError`."""
        context, now = self._context, time.monotonic()
        while self._departures and self._departures[0].sequence_number <= sequence_number:
            departure = self._departures.popleft()
            if departure.transfer is not None:
                departure.transfer.wait(context.config.transfer_timeout)
            self._ring.give_back()
            on_wire = max(0.0, now - max(departure.posted, self._arrived_at))
            self._arrived_at = now
            context.counters.acknowledged(on_wire)
            context.trace.sent(
                context.peer_name, departure.ref, departure.began, departure.packed,
                departure.posted,
            )  # fmt: skip

    def discard(self) -> None:
        """The epoch is over: forget what is on its way; the ledger sends it again."""
        self._departures.clear()
        self._ring.discard()
