"""Receives that are posted: pieces that were announced and are on their way into staging."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from tandem.transfer import messages
from tandem.transfer.context import LinkContext
from tandem.transfer.group import LinkError, LinkGroup, Transfer
from tandem.transfer.receive_ledger import PieceRange, Target
from tandem.transfer.staging import Region, StagingRing
from tandem.v1 import worker_pb2


class Arrival(NamedTuple):
    """Pieces that are received, or being received, in one send."""

    announced: list[worker_pb2.LinkAnnounce]
    region: Region
    transfer: Transfer
    posted: float

    @property
    def last_number(self) -> int:
        return self.announced[-1].sequence_number


class Arrivals:
    """Posted receives of one epoch, in the order of the wire. Used by the link's thread only."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._ring = StagingRing(context.blocks, context.backend)
        self._posted: deque[Arrival] = deque()
        self._last_posted = 0
        self._arrived_at = 0.0

    def __len__(self) -> int:
        return len(self._posted)

    def probe(self) -> torch.Tensor:
        """One byte, from the wire; only before the first piece of an epoch."""
        return self._ring.probe()

    def has_room(self, announce: worker_pb2.LinkAnnounce) -> bool:
        """Whether what was announced can be received now; else after the next `release`."""
        return self._ring.has_room(self._nbytes(announce))

    def post(self, announce: worker_pb2.LinkAnnounce, group: LinkGroup) -> None:
        """Receive announced pieces behind those before. Raises `LinkError` out of order."""
        announced = [announce, *announce.more]
        for number, each in enumerate(announced, self._last_posted + 1):
            if each.sequence_number != number:
                raise LinkError(f"piece {each.sequence_number} announced, {number} was next")
        region = self._ring.take(self._nbytes(announce))
        posted = time.monotonic()
        transfer = group.post_recv(self._ring.wire(region))
        self._posted.append(Arrival(announced, region, transfer, posted))
        self._last_posted = announced[-1].sequence_number

    def wait(self) -> tuple[Arrival, float]:
        """Wait for the oldest send, which keeps its staging until `release`.

        Returns it and the seconds that the wire was busy with it. Raises `LinkError`.
        """
        arrival = self._posted[0]
        arrival.transfer.wait(self._context.config.transfer_timeout)
        now = time.monotonic()
        seconds = now - max(arrival.posted, self._arrived_at)
        self._arrived_at = now
        return arrival, seconds

    def pieces(self, arrival: Arrival) -> Iterator[tuple[PieceRange, torch.Tensor]]:
        """What arrived, and the staging that it is in."""
        start = arrival.region.start
        for each in arrival.announced:
            yield (
                messages.piece_range(each),
                self._ring.staged(start, each.num_layers, each.num_tokens),
            )
            start += self._ring.nbytes(each.num_layers, each.num_tokens)

    def scatter(self, piece: PieceRange, staged: torch.Tensor, target: Target) -> None:
        """Copy a received piece into blocks."""
        self._ring.unpack(piece.first_layer, target.slots, staged, target.written)

    def release(self) -> None:
        """The oldest send has been dealt with."""
        self._posted.popleft()
        self._ring.give_back()

    def discard(self) -> None:
        """The epoch is over: forget what has not arrived, and count from 1 again."""
        self._posted.clear()
        self._ring.discard()
        self._last_posted = 0

    def _nbytes(self, announce: worker_pb2.LinkAnnounce) -> int:
        pieces = (announce, *announce.more)
        return sum(self._ring.nbytes(each.num_layers, each.num_tokens) for each in pieces)
