"""The search for the highest rate that a cluster sustains on one stretch of a trace.

Pure: who tries a rate is the caller's business.

Invariant: it ends, whatever the trials say: rates far off the first one are not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

RUNG = 1.3
"""How much faster requests come from rung to rung."""
_NARROW = 1.04
"""A finalist's rate is bracketed as closely as this."""
_FAR_OFF = 8
"""How far from the last rung a finalist's rate on one stretch is looked for."""


@dataclass
class Bracket:
    """The search for the highest rate that is sustained on one stretch."""

    next: float
    low: float = 0.0
    """The highest that was sustained; 0: none yet."""
    high: float = 0.0
    """The lowest that was not; 0: none yet."""

    def __post_init__(self) -> None:
        self._floor, self._ceiling = self.next / _FAR_OFF, self.next * _FAR_OFF

    @property
    def is_narrow(self) -> bool:
        """Whether `low` is close enough. On some stretches no rate is low enough, for a few prompts
        are too long for the objectives even alone: then it is 0."""
        if 0 < self.high <= self._floor or self.low >= self._ceiling:
            return True
        return self.low > 0 and 0 < self.high <= self.low * _NARROW

    def tried(self, sustained: bool) -> None:
        """Take the result of `next`."""
        if sustained:
            self.low = self.next
        else:
            self.high = self.next
        if self.low and self.high:
            self.next = (self.low * self.high) ** 0.5
        else:
            self.next = self.low * RUNG or self.high / RUNG
