"""Which legs still expect KV, and what of it has landed. Pure: no lock, clock or I/O.

Invariants: a piece is scattered only into a leg that expects it, and at most once; a leg closes
exactly once, and never while a scatter into its blocks runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class PieceRange(NamedTuple):
    """KV of tokens [start, start + num_tokens) in num_layers layers from first_layer on."""

    leg_id: int
    first_layer: int
    num_layers: int
    start: int
    num_tokens: int


class RejectedPieceError(Exception):
    """A piece does not fit what its leg expects. Its leg fails; the link goes on."""


@dataclass(slots=True)
class _Leg:
    start: int
    slots: torch.Tensor
    written: torch.cuda.Event | None
    ending: bool = False
    landed: set[PieceRange] = field(default_factory=set)


class Target(NamedTuple):
    """Where a piece is to be scattered."""

    slots: torch.Tensor
    written: torch.cuda.Event | None
    """Compute that must finish first: it may still use the blocks' earlier content."""


class ReceiveLedger:
    """The bookkeeping of one receiving direction.

    A leg::

        expected --close--> closed
           |  ^
           v  | end
        scattering --close--> closing --end--> closed

    Mutations collect closed legs; `take_closed` hands each out once.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._legs: dict[int, _Leg] = {}
        self._scattering: PieceRange | None = None
        self._closed: list[int] = []
        self._shut = False

    @property
    def expected_legs(self) -> list[int]:
        return [leg_id for leg_id, leg in self._legs.items() if not leg.ending]

    def expect(
        self, leg_id: int, start: int, slots: torch.Tensor, written: torch.cuda.Event | None = None
    ) -> None:
        """Positions [start, start + len(slots)) are wanted. After `shut` the leg closes at once."""
        if leg_id in self._legs:
            raise ValueError(f"leg {leg_id} is already expected")
        if self._shut:
            self._closed.append(leg_id)
            return
        self._legs[leg_id] = _Leg(start, slots, written)

    def begin(self, piece: PieceRange) -> Target | None:
        """Where an arrived piece goes; None: nowhere, it is drained. Call `end` after a scatter.

        Raises `RejectedPieceError` if the leg expects something else.
        """
        leg = self._legs.get(piece.leg_id)
        if leg is None or leg.ending or piece in leg.landed:
            return None
        first, last = piece.start - leg.start, piece.start - leg.start + piece.num_tokens
        if first < 0 or last > len(leg.slots):
            raise RejectedPieceError(
                f"leg {piece.leg_id} expects tokens {leg.start}..{leg.start + len(leg.slots)}, "
                f"got {piece.start}..{piece.start + piece.num_tokens}"
            )
        if piece.first_layer + piece.num_layers > self._num_layers:
            raise RejectedPieceError(
                f"leg {piece.leg_id} has {self._num_layers} layers, got layers "
                f"{piece.first_layer}..{piece.first_layer + piece.num_layers}"
            )
        self._scattering = piece
        return Target(leg.slots[first:last], leg.written)

    def end(self, *, landed: bool) -> None:
        """The scatter that `begin` allowed is over."""
        piece, self._scattering = self._scattering, None
        if piece is None:
            return
        leg = self._legs[piece.leg_id]
        if landed:
            leg.landed.add(piece)
        if leg.ending:
            self._forget(piece.leg_id)

    def close(self, leg_id: int) -> None:
        """Nothing more is wanted for this leg: cancelled or complete."""
        leg = self._legs.get(leg_id)
        if leg is None:
            return
        leg.ending = True
        if self._scattering is None or self._scattering.leg_id != leg_id:
            self._forget(leg_id)

    def shut(self) -> None:
        """The peer is gone: close every leg, and each that is still expected."""
        self._shut = True
        for leg_id in list(self._legs):
            self.close(leg_id)

    def take_closed(self) -> list[int]:
        """Legs that closed since the last call."""
        closed, self._closed = self._closed, []
        return closed

    def _forget(self, leg_id: int) -> None:
        del self._legs[leg_id]
        self._closed.append(leg_id)
