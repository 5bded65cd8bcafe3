"""Property tests of the bookkeeping: order kept, every leg closed exactly once and never early."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tandem.transfer.receive_ledger import PieceRange, ReceiveLedger, RejectedPieceError
from tandem.transfer.send_ledger import ClosedSend, Outgoing, SendLedger
from tandem.transfer.types import Piece

LEGS = st.integers(0, 4)
NO_SLOTS = torch.zeros(1, dtype=torch.int64)


class Sending(RuleBasedStateMachine):
    """A sender and a model of its link: what is on the wire, and what the receiver has seen."""

    @initialize()
    def start(self) -> None:
        self.ledger = SendLedger()
        self.added: list[Piece] = []
        self.wire: list[Outgoing] = []
        self.acknowledged: set[Piece] = set()
        self.sent_ever: set[Piece] = set()
        self.open: set[int] = set()
        self.ending: set[int] = set()
        self.lost: set[int] = set()
        self.reading: Piece | None = None
        self.closed: list[ClosedSend] = []
        self.shut = False

    @rule(leg=LEGS)
    def opens(self, leg: int) -> None:
        if leg in self.open:
            with pytest.raises(ValueError, match="already open"):
                self.ledger.open(leg)
            return
        self.ledger.open(leg)
        if not self.shut:
            self.open.add(leg)
            self.added = [piece for piece in self.added if piece.leg_id != leg]
        self._collect(allowed={leg} if self.shut else set())

    @rule(leg=LEGS)
    def adds(self, leg: int) -> None:
        piece = Piece(leg, 0, 0, 1, len(self.added), NO_SLOTS)
        accepted = self.ledger.add(piece)
        assert accepted == (leg in self.open and leg not in self.ending)
        if accepted:
            self.added.append(piece)
        self._collect()

    @rule(leg=LEGS)
    def finishes(self, leg: int) -> None:
        self.ledger.finish(leg)
        if leg in self.open:
            self.ending.add(leg)
        self._collect()

    @rule(leg=LEGS)
    def cancels(self, leg: int) -> None:
        self.ledger.cancel(leg)
        if leg in self.open:
            self.ending.add(leg)
            self.lost.add(leg)
        self._collect()

    @precondition(lambda self: self.reading is None and self.ledger.has_queued)
    @rule()
    def begins(self) -> None:
        outgoing = self.ledger.begin()
        assert outgoing.sequence_number == len(self.wire) + 1
        expected = next(
            piece
            for piece in self.added
            if piece not in self.acknowledged
            and piece not in {sent.piece for sent in self.wire}
            and piece.leg_id not in self.lost
        )
        assert outgoing.piece is expected, "pieces leave in the order in which they came"
        self.wire.append(outgoing)
        self.sent_ever.add(outgoing.piece)
        self.reading = outgoing.piece
        self._collect()

    @precondition(lambda self: self.reading is not None)
    @rule()
    def ends_read(self) -> None:
        self.reading = None
        self.ledger.end_read()
        self._collect()

    @precondition(lambda self: self.reading is not None)
    @rule()
    def abandons(self) -> None:
        assert self.reading is not None
        leg, self.reading = self.reading.leg_id, None
        failed = self.ledger.abandon("cannot read")
        if leg in self.open and not self.shut and self.wire:
            assert failed == [leg]
            self.wire.pop()
            self.ending.add(leg)
            self.lost.add(leg)
        self._collect()

    @precondition(lambda self: self.reading is None)
    @rule(number=st.integers(1, 6))
    def acknowledges(self, number: int) -> None:
        assert self.ledger.ack(number) == (number <= len(self.wire))
        if number <= len(self.wire):
            self.acknowledged |= {sent.piece for sent in self.wire[:number]}
        self._collect()

    @precondition(lambda self: self.reading is None)
    @rule()
    def rewinds(self) -> None:
        self.ledger.rewind()
        self.wire = []
        self._collect()

    @precondition(lambda self: self.reading is None)
    @rule()
    def fails(self) -> None:
        failed = self.ledger.fail("dead")
        assert set(failed) == self.open
        self._drop_everything()
        self._collect()

    @rule()
    def shuts(self) -> None:
        self.ledger.shut("gone")
        self._drop_everything()
        self.shut = True
        self._collect()

    def _drop_everything(self) -> None:
        self.ending |= self.open
        self.lost |= self.open
        self.wire = []
        self.added = []

    def _collect(self, allowed: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        for leg, _error in self.ledger.take_closed():
            assert leg in self.open | set(allowed), "closed twice, or never opened"
            if leg in self.open:
                assert leg in self.ending
                assert self.reading is None or self.reading.leg_id != leg, "closed while read"
                mine = {sent.piece for sent in self.wire if sent.piece.leg_id == leg}
                assert mine <= self.acknowledged, "closed with a piece in flight"
            self.open.discard(leg)
            self.ending.discard(leg)
            self.lost.discard(leg)
            self.added = [piece for piece in self.added if piece.leg_id != leg]

    @invariant()
    def closes_as_soon_as_it_may(self) -> None:
        for leg in self.ending:
            being_read = self.reading is not None and self.reading.leg_id == leg
            in_flight = any(
                sent.piece.leg_id == leg and sent.piece not in self.acknowledged
                for sent in self.wire
            )
            queued = leg not in self.lost and any(
                piece.leg_id == leg and piece not in self.acknowledged for piece in self.added
            )
            assert being_read or in_flight or queued


Sending.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSending = Sending.TestCase


class Receiving(RuleBasedStateMachine):
    """A receiver: which legs are expected, what landed, what is being scattered."""

    @initialize()
    def start(self) -> None:
        self.ledger = ReceiveLedger(num_layers=2)
        self.expected: dict[int, set[PieceRange]] = {}
        self.ending: set[int] = set()
        self.scattering: PieceRange | None = None
        self.shut = False

    @rule(leg=LEGS)
    def expects(self, leg: int) -> None:
        if leg in self.expected:
            with pytest.raises(ValueError, match="already expected"):
                self.ledger.expect(leg, 4, torch.arange(4))
            return
        self.ledger.expect(leg, 4, torch.arange(4))
        if self.shut:
            assert self.ledger.take_closed() == [leg]
        else:
            self.expected[leg] = set()
        self._collect()

    @precondition(lambda self: self.scattering is None)
    @rule(leg=LEGS, layer=st.integers(0, 2), start=st.integers(2, 8), num_tokens=st.integers(1, 5))
    def begins(self, leg: int, layer: int, start: int, num_tokens: int) -> None:
        piece = PieceRange(leg, layer, 1, start, num_tokens)
        if leg not in self.expected or piece in self.expected[leg]:
            assert self.ledger.begin(piece) is None
        elif start < 4 or start + num_tokens > 8 or layer > 1:
            with pytest.raises(RejectedPieceError):
                self.ledger.begin(piece)
        else:
            target = self.ledger.begin(piece)
            assert target is not None
            assert target.slots.tolist() == list(range(start - 4, start - 4 + num_tokens))
            self.scattering = piece
        self._collect()

    @precondition(lambda self: self.scattering is not None)
    @rule(landed=st.booleans())
    def ends(self, landed: bool) -> None:
        piece, self.scattering = self.scattering, None
        assert piece is not None
        self.ledger.end(landed=landed)
        if landed:
            self.expected[piece.leg_id].add(piece)
        self._collect()

    @rule(leg=LEGS)
    def closes(self, leg: int) -> None:
        self.ledger.close(leg)
        self.ending |= {leg} & self.expected.keys()
        self._collect()

    @rule()
    def shuts(self) -> None:
        self.ledger.shut()
        self.shut = True
        self.ending |= self.expected.keys()
        self._collect()

    def _collect(self) -> None:
        busy = {self.scattering.leg_id} if self.scattering else set()
        assert set(self.ledger.expected_legs) == self.expected.keys() - self.ending
        closed = self.ledger.take_closed()
        assert sorted(closed) == sorted(self.ending - busy), "each once, at once, never early"
        for leg in closed:
            del self.expected[leg]
            self.ending.discard(leg)


Receiving.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestReceiving = Receiving.TestCase
