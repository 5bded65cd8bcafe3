"""Which pieces of which legs are queued, in flight or acknowledged. Pure: no lock, clock or I/O.

Invariants: pieces leave in the order in which they came, over all legs; a leg closes exactly once,
and never while one of its blocks may still be read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from tandem.transfer.types import Piece


class Outgoing(NamedTuple):
    """A piece that has its place on the wire."""

    sequence_number: int
    """Consecutive within an epoch, from 1."""
    piece: Piece


class ClosedSend(NamedTuple):
    """A leg that has closed, for `TransferEvents.sends_closed`."""

    leg_id: int
    error: str | None


@dataclass(slots=True)
class _Leg:
    outstanding: int = 0
    """Pieces queued or in flight."""
    ending: bool = False
    """Finished, cancelled or failed: it closes when nothing is outstanding."""
    cancelled: bool = False
    error: str | None = None


class SendLedger:
    """The bookkeeping of one sending direction.

    A leg::

        open --finish--> finishing --last ack-----------------------> closed(None)
          |---cancel---> cancelled (queued pieces dropped) --last ack-> closed(None)
          +---fail-----> failed (everything dropped) ----------------> closed(error)

    A leg whose piece is being read (`begin` .. `end_read`) closes at `end_read` at the earliest.
    Mutations collect closed legs; `take_closed` hands each out once.
    """

    def __init__(self) -> None:
        self._legs: dict[int, _Leg] = {}
        self._queue: deque[Piece] = deque()
        self._in_flight: deque[Outgoing] = deque()
        self._next_sequence_number = 1
        self._reading: int | None = None
        self._closed: list[ClosedSend] = []
        self._shut: str | None = None

    @property
    def has_queued(self) -> bool:
        return bool(self._queue)

    @property
    def first_queued(self) -> Piece:
        """The piece that `begin` would take; there must be one."""
        return self._queue[0]

    @property
    def has_in_flight(self) -> bool:
        return bool(self._in_flight)

    @property
    def idle(self) -> bool:
        """Nothing queued and nothing unacknowledged."""
        return not self._queue and not self._in_flight

    @property
    def open_legs(self) -> list[int]:
        return list(self._legs)

    def open(self, leg_id: int) -> None:
        """Start a leg. After `shut` it closes at once."""
        if leg_id in self._legs:
            raise ValueError(f"leg {leg_id} is already open for sending")
        if self._shut is not None:
            self._closed.append(ClosedSend(leg_id, self._shut))
            return
        self._legs[leg_id] = _Leg()

    def add(self, piece: Piece) -> bool:
        """Queue a piece. False, and nothing happens, if its leg is not open or is ending."""
        leg = self._legs.get(piece.leg_id)
        if leg is None or leg.ending:
            return False
        leg.outstanding += 1
        self._queue.append(piece)
        return True

    def finish(self, leg_id: int) -> None:
        """No more pieces will come for this leg."""
        if leg := self._legs.get(leg_id):
            leg.ending = True
            self._settle(leg_id)

    def cancel(self, leg_id: int) -> None:
        """Drop what is queued of a leg; what is in flight still goes its way."""
        if leg := self._legs.get(leg_id):
            leg.ending = leg.cancelled = True
            self._drop_queued(leg_id)
            self._settle(leg_id)

    def begin(self) -> Outgoing:
        """Give the first queued piece the next sequence number; its blocks are read from now on."""
        outgoing = Outgoing(self._next_sequence_number, self._queue.popleft())
        self._next_sequence_number += 1
        self._in_flight.append(outgoing)
        self._reading = outgoing.piece.leg_id
        return outgoing

    def end_read(self) -> None:
        """The piece of the last `begin` has been copied out of its blocks."""
        leg_id, self._reading = self._reading, None
        if leg_id is not None:
            self._settle(leg_id)

    def abandon(self, error: str) -> list[int]:
        """The piece of the last `begin` could not be read: take it back and fail its leg.

        Returns the legs that fail: one, or none if it had failed before.
        """
        leg_id, self._reading = self._reading, None
        if leg_id is None or leg_id not in self._legs:
            return []
        leg = self._legs[leg_id]
        if self._in_flight:
            self._in_flight.pop()
            self._next_sequence_number -= 1
            leg.outstanding -= 1
        leg.ending = leg.cancelled = True
        already_failed, leg.error = leg.error is not None, leg.error or error
        self._drop_queued(leg_id)
        self._settle(leg_id)
        return [] if already_failed else [leg_id]

    def ack(self, sequence_number: int) -> bool:
        """Everything up to this number has arrived. False if it was never sent in this epoch."""
        if sequence_number >= self._next_sequence_number:
            return False
        while self._in_flight and self._in_flight[0].sequence_number <= sequence_number:
            leg_id = self._in_flight.popleft().piece.leg_id
            self._legs[leg_id].outstanding -= 1
            self._settle(leg_id)
        return True

    def rewind(self) -> None:
        """A new epoch: what was not acknowledged goes out again, in order, from number 1."""
        again = [outgoing.piece for outgoing in self._in_flight]
        self._in_flight.clear()
        self._next_sequence_number = 1
        for piece in reversed(again):
            leg = self._legs[piece.leg_id]
            if leg.cancelled:
                leg.outstanding -= 1
            else:
                self._queue.appendleft(piece)
        for leg_id in {piece.leg_id for piece in again}:
            self._settle(leg_id)

    def fail(self, error: str) -> list[int]:
        """The link is dead for good: drop everything. Returns the legs that fail."""
        self._queue.clear()
        self._in_flight.clear()
        self._next_sequence_number = 1
        failed = self.open_legs
        for leg_id in failed:
            leg = self._legs[leg_id]
            leg.outstanding = 0
            leg.ending = leg.cancelled = True
            leg.error = leg.error or error
            self._settle(leg_id)
        return failed

    def shut(self, error: str) -> None:
        """The peer is gone: fail every leg, and each that is still opened."""
        self._shut = error
        self.fail(error)

    def take_closed(self) -> list[ClosedSend]:
        """Legs that closed since the last call."""
        closed, self._closed = self._closed, []
        return closed

    def _drop_queued(self, leg_id: int) -> None:
        kept = deque(piece for piece in self._queue if piece.leg_id != leg_id)
        self._legs[leg_id].outstanding -= len(self._queue) - len(kept)
        self._queue = kept

    def _settle(self, leg_id: int) -> None:
        leg = self._legs.get(leg_id)
        if leg and leg.ending and not leg.outstanding and self._reading != leg_id:
            del self._legs[leg_id]
            self._closed.append(ClosedSend(leg_id, leg.error))
