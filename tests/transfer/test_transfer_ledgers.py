"""Property tests of the bookkeeping: order kept, every leg closed exactly once and never early.

Random programs run on a ledger and on a plain model of it; the two must agree after each step. A
step that makes no sense in the model's state (reading while reading) is skipped.
"""

from __future__ import annotations

from collections.abc import Collection

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from tandem.transfer.receive_ledger import PieceRange, ReceiveLedger, RejectedPieceError
from tandem.transfer.send_ledger import Outgoing, SendLedger
from tandem.transfer.types import Piece

LEGS = st.integers(0, 2)
SLOTS = torch.zeros(1, dtype=torch.int64)


def programs(steps: dict[str, int]) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    """Lists of (step, leg, number); a step is drawn as often as its weight says."""
    names = [name for name, weight in steps.items() for _ in range(weight)]
    step = st.tuples(st.sampled_from(names), LEGS, st.integers(1, 5))
    return st.lists(step, min_size=25, max_size=60)


class SendModel:
    """What a sender may do, what is on the wire, and what the receiver has acknowledged."""

    def __init__(self) -> None:
        self.ledger = SendLedger()
        self.waiting: list[Piece] = []
        self.wire: list[Outgoing] = []
        self.acknowledged = 0
        self.open: set[int] = set()
        self.ending: set[int] = set()
        self.cancelled: set[int] = set()
        self.reading: Piece | None = None
        self.shut = False

    def opens(self, leg: int, _: int) -> None:
        if leg in self.open:
            with pytest.raises(ValueError, match="already open"):
                self.ledger.open(leg)
        else:
            self.ledger.open(leg)
            if not self.shut:
                self.open.add(leg)
            self.collect(refused={leg} if self.shut else ())

    def adds(self, leg: int, count: int) -> None:
        for start in range(count):
            piece = Piece(leg, 0, 0, 1, start, SLOTS)
            accepted = self.ledger.add(piece)
            assert accepted == (leg in self.open - self.ending)
            if accepted:
                self.waiting.append(piece)

    def finishes(self, leg: int, _: int) -> None:
        self.ledger.finish(leg)
        self.ending |= {leg} & self.open

    def cancels(self, leg: int, _: int) -> None:
        self.ledger.cancel(leg)
        self._lose({leg} & self.open)

    def begins(self, _: int, __: int) -> None:
        assert self.ledger.has_queued == bool(self.waiting)
        if self.waiting and self.reading is None:
            outgoing = self.ledger.begin()
            assert outgoing == (len(self.wire) + 1, self.waiting.pop(0)), "out of order"
            self.wire.append(outgoing)
            self.reading = outgoing.piece

    def ends_read(self, _: int, __: int) -> None:
        self.reading = None
        self.ledger.end_read()

    def abandons(self, _: int, __: int) -> None:
        piece, self.reading = self.reading, None
        failed = self.ledger.abandon("cannot read")
        if piece is None or self.shut:
            assert failed == []
        else:
            assert failed == [piece.leg_id]
            self.wire.pop()
            self._lose({piece.leg_id})

    def acknowledges(self, _: int, number: int) -> None:
        if self.reading is None:
            known = number <= len(self.wire)
            assert self.ledger.ack(number) == known
            if known:
                self.acknowledged = max(self.acknowledged, number)

    def rewinds(self, _: int, __: int) -> None:
        if self.reading is None:
            self.ledger.rewind()
            again = [sent.piece for sent in self.wire[self.acknowledged :]]
            kept = [piece for piece in again if piece.leg_id not in self.cancelled]
            self.waiting = kept + self.waiting
            self.wire, self.acknowledged = [], 0

    def fails(self, _: int, __: int) -> None:
        if self.reading is None:
            assert set(self.ledger.fail("dead")) == self.open
            self._lose_everything()

    def shuts(self, _: int, __: int) -> None:
        self.ledger.shut("gone")
        self.shut = True
        self._lose_everything()

    def _lose(self, legs: set[int]) -> None:
        self.ending |= legs
        self.cancelled |= legs
        self.waiting = [piece for piece in self.waiting if piece.leg_id not in legs]

    def _lose_everything(self) -> None:
        self._lose(set(self.open))
        self.wire, self.acknowledged = [], 0

    def collect(self, refused: Collection[int] = ()) -> None:
        """Exactly those legs have closed that are ending and have nothing left."""
        busy = {sent.piece.leg_id for sent in self.wire[self.acknowledged :]}
        busy |= {piece.leg_id for piece in self.waiting}
        if self.reading is not None:
            busy.add(self.reading.leg_id)
        done = self.ending - busy
        assert sorted(leg for leg, _ in self.ledger.take_closed()) == sorted({*done, *refused})
        self.open -= done
        self.ending -= done
        self.cancelled -= done
        assert set(self.ledger.open_legs) == self.open


SENDING = {
    "opens": 3,
    "adds": 3,
    "begins": 4,
    "ends_read": 4,
    "acknowledges": 3,
    "finishes": 2,
    "cancels": 1,
    "rewinds": 2,
    "abandons": 1,
    "fails": 1,
    "shuts": 1,
}


@settings(max_examples=150, deadline=None)
@example([("opens", 0, 1), ("adds", 0, 1), ("begins", 0, 1), ("shuts", 0, 1), ("ends_read", 0, 1)])
@example(
    [
        *[("opens", 0, 1), ("opens", 1, 1), ("adds", 0, 1), ("adds", 1, 1)],
        *[("begins", 0, 1), ("ends_read", 0, 1)] * 2,
        *[("cancels", 0, 1), ("rewinds", 0, 1), ("begins", 0, 1)],
    ]
)
@given(programs(SENDING))
def test_the_send_ledger_keeps_order_and_closes_each_leg_once(
    program: list[tuple[str, int, int]],
) -> None:
    model = SendModel()
    for step, leg, number in program:
        getattr(model, step)(leg, number)
        model.collect()


class ReceiveModel:
    """Which legs are expected, what of them has landed, and what is being scattered."""

    def __init__(self) -> None:
        self.ledger = ReceiveLedger(num_layers=2)
        self.expected: dict[int, set[PieceRange]] = {}
        self.ending: set[int] = set()
        self.scattering: PieceRange | None = None
        self.shut = False

    def expects(self, leg: int, _: int) -> None:
        if leg in self.expected:
            with pytest.raises(ValueError, match="already expected"):
                self.ledger.expect(leg, 4, torch.arange(3))
        else:
            self.ledger.expect(leg, 4, torch.arange(3))
            if not self.shut:
                self.expected[leg] = set()
            self.collect(refused=[leg] if self.shut else [])

    def begins(self, leg: int, number: int) -> None:
        """Numbers 1 to 3 fit the leg; 4 and 5 lie outside its tokens and the model's layers."""
        if self.scattering is not None:
            return
        piece = [
            PieceRange(leg, 0, 2, 4, 3),
            PieceRange(leg, 1, 1, 5, 1),
            PieceRange(leg, 0, 1, 5, 2),
            PieceRange(leg, 0, 1, 6, 2),
            PieceRange(leg, 1, 2, 4, 1),
        ][number - 1]
        if leg not in self.expected or piece in self.expected[leg]:
            assert self.ledger.begin(piece) is None
        elif number >= 4:
            with pytest.raises(RejectedPieceError):
                self.ledger.begin(piece)
        else:
            target = self.ledger.begin(piece)
            assert target is not None
            assert target.slots.tolist() == [[0, 1, 2], [1], [1, 2]][number - 1]
            self.scattering = piece

    def lands(self, _: int, __: int) -> None:
        piece, self.scattering = self.scattering, None
        self.ledger.end(landed=True)
        if piece is not None:
            self.expected[piece.leg_id].add(piece)

    def is_spoilt(self, _: int, __: int) -> None:
        self.scattering = None
        self.ledger.end(landed=False)

    def closes(self, leg: int, _: int) -> None:
        self.ledger.close(leg)
        self.ending |= {leg} & self.expected.keys()

    def shuts(self, _: int, __: int) -> None:
        self.ledger.shut()
        self.shut = True
        self.ending |= self.expected.keys()

    def collect(self, refused: Collection[int] = ()) -> None:
        """Exactly those legs have closed that are ending and are not being written."""
        busy = {self.scattering.leg_id} if self.scattering else set()
        done = self.ending - busy
        assert sorted(self.ledger.take_closed()) == sorted({*done, *refused})
        self.ending -= done
        for leg in done:
            del self.expected[leg]
        assert set(self.ledger.expected_legs) == self.expected.keys() - self.ending


RECEIVING = {"expects": 3, "begins": 5, "lands": 4, "is_spoilt": 1, "closes": 2, "shuts": 1}


@settings(max_examples=120, deadline=None)
@given(programs(RECEIVING))
def test_the_receive_ledger_scatters_once_and_closes_each_leg_once(
    program: list[tuple[str, int, int]],
) -> None:
    model = ReceiveModel()
    for step, leg, number in program:
        getattr(model, step)(leg, number)
        model.collect()
