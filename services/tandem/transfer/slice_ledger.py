"""What of a leg all links of all ranks have done. Pure: no lock, clock or I/O.

Invariants: a piece has landed when every slice of it has; a leg is closed when every link has
closed it, and then once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from tandem.transfer.receive_ledger import PieceRange


class LandedPiece(NamedTuple):
    """A piece that stands in its blocks on every rank."""

    piece: PieceRange
    seconds: float
    """On the wire; of the slice that took longest, as they travel side by side."""
    nbytes: int
    """Of all slices."""


@dataclass(slots=True)
class _Arriving:
    slices: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@dataclass(slots=True)
class _Leg:
    open_links: int
    error: str | None = None
    pieces: dict[PieceRange, _Arriving] = field(default_factory=dict)


class SliceLedger:
    """Both directions of one peer: how many links each has, and where its legs stand."""

    def __init__(self, send_links: int, receive_links: int) -> None:
        self._send_links = send_links
        self._receive_links = receive_links
        self._sends: dict[int, _Leg] = {}
        self._receives: dict[int, _Leg] = {}

    @property
    def idle(self) -> bool:
        """No leg is open."""
        return not self._sends and not self._receives

    def open_sends(self, leg_id: int) -> None:
        """A leg is sent on every link."""
        if leg_id in self._sends:
            raise ValueError(f"leg {leg_id} is already open for sending")
        self._sends[leg_id] = _Leg(self._send_links)

    def expect(self, leg_id: int) -> None:
        """A leg is expected on every link."""
        if leg_id in self._receives:
            raise ValueError(f"leg {leg_id} is already expected")
        self._receives[leg_id] = _Leg(self._receive_links)

    def landed(self, piece: PieceRange, seconds: float, nbytes: int) -> LandedPiece | None:
        """A slice landed; returns the piece if that was the last of it."""
        leg = self._receives.get(piece.leg_id)
        if leg is None:
            return None
        arriving = leg.pieces.setdefault(piece, _Arriving())
        arriving.slices += 1
        arriving.seconds = max(arriving.seconds, seconds)
        arriving.nbytes += nbytes
        if arriving.slices < self._receive_links:
            return None
        del leg.pieces[piece]
        return LandedPiece(piece, arriving.seconds, arriving.nbytes)

    def sends_closed(self, leg_id: int, error: str | None) -> tuple[bool, str | None]:
        """A link closed a leg; returns whether that was the last one, and the first error."""
        leg = self._sends.get(leg_id)
        if leg is None:
            return False, None
        leg.error = leg.error or error
        return self._close(self._sends, leg_id), leg.error

    def receives_closed(self, leg_id: int) -> bool:
        """A link closed a leg; returns whether that was the last one."""
        return leg_id in self._receives and self._close(self._receives, leg_id)

    @staticmethod
    def _close(legs: dict[int, _Leg], leg_id: int) -> bool:
        legs[leg_id].open_links -= 1
        if legs[leg_id].open_links:
            return False
        del legs[leg_id]
        return True
