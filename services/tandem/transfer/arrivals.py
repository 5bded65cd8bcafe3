"""Receives that are posted: pieces that were announced and are on their way into staging."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import torch

from tandem.transfer import messages
from tandem.transfer.context import LinkContext
from tandem.transfer.group import LinkError, LinkGroup, Transfer
from tandem.transfer.receive_ledger import PieceRange, Target
from tandem.transfer.staging import Region, StagingRing
from tandem.v1 import worker_pb2


class Arrival(NamedTuple):
    """A piece that is received or being received."""

    sequence_number: int
    piece: PieceRange
    region: Region
    transfer: Transfer
    posted: float


class Arrivals:
    """Posted receives of one epoch, in the order of the wire. Used by the link's thread only."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._ring = StagingRing(context.blocks, context.spec)
        self._posted: deque[Arrival] = deque()
        self._last_posted = 0
        self._arrived_at = 0.0

    def __len__(self) -> int:
        return len(self._posted)

    def probe(self) -> torch.Tensor:
        """One byte, from the wire; only before the first piece of an epoch."""
        return self._ring.probe()

    def has_room(self, announce: worker_pb2.LinkAnnounce) -> bool:
        """Whether an announced piece can be received now; else after the next `release`."""
        return self._ring.has_room(announce.num_layers, announce.num_tokens)

    def post(self, announce: worker_pb2.LinkAnnounce, group: LinkGroup) -> None:
        """Receive an announced piece behind those before it. Raises `LinkError` out of order."""
        number, expected = announce.sequence_number, self._last_posted + 1
        if number != expected:
            raise LinkError(f"piece {number} announced, {expected} was next")
        region = self._ring.take(announce.num_layers, announce.num_tokens)
        posted = time.monotonic()
        transfer = group.post_recv(region.wire)
        self._last_posted = number
        piece = messages.piece_range(announce)
        self._posted.append(Arrival(number, piece, region, transfer, posted))

    def wait(self) -> tuple[Arrival, float]:
        """Wait for the oldest piece, which keeps its staging until `release`.

        Returns it and the seconds that the wire was busy with it. Raises `LinkError`.
        """
        arrival = self._posted[0]
        arrival.transfer.wait(self._context.config.transfer_timeout)
        now = time.monotonic()
        seconds = now - max(arrival.posted, self._arrived_at)
        self._arrived_at = now
        return arrival, seconds

    def scatter(self, arrival: Arrival, target: Target) -> None:
        """Copy a received piece into blocks."""
        self._ring.unpack(arrival.piece.first_layer, target.slots, arrival.region, target.written)

    def release(self) -> None:
        """The oldest piece has been dealt with."""
        self._posted.popleft()
        self._ring.give_back()

    def discard(self) -> None:
        """The epoch is over: forget what has not arrived, and count from 1 again."""
        self._posted.clear()
        self._ring.discard()
        self._last_posted = 0
