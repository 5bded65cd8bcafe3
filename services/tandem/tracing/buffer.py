"""The ring of events of one process: plain tuples, newest last, the oldest give way.

Every hook is one call on the path of a request or an iteration. While nothing is recorded it
reads one attribute; while something is, it appends one tuple to a bounded deque, which needs no
lock: `deque.append` is atomic. Recording ends by itself, so that an operator who goes away leaves
nothing running. Times are `time.monotonic()` of this process.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from tandem.core.sequence import IterationPlan
from tandem.timeline.events import Part, StageName, parts_of

DEFAULT_CAPACITY = 65536


class IterationEvent(NamedTuple):
    """One iteration of this worker."""

    began: float
    ended: float
    parts: tuple[Part, ...]


class StageEvent(NamedTuple):
    """A request, by its name inside the cluster, passed a boundary here."""

    at: float
    request: str
    name: StageName


class LegEvent(NamedTuple):
    """A decode worker began a leg: pieces are stamped with its number."""

    at: float
    request: str
    leg_id: int


class PieceRef(NamedTuple):
    """Which KV: tokens [start, start + length) in num_layers layers, of one leg."""

    leg_id: int
    start: int
    length: int
    first_layer: int
    num_layers: int


class SentEvent(NamedTuple):
    """A piece left for `peer`."""

    at: float
    """The last byte was handed to the wire."""
    peer: str
    piece: PieceRef
    began: float
    packed: float
    announced: float


class LandedEvent(NamedTuple):
    """A piece from `peer` stands in its blocks."""

    at: float
    peer: str
    piece: PieceRef


Event = IterationEvent | StageEvent | LegEvent | SentEvent | LandedEvent


def time_of(event: Event) -> float:
    """When an event was over."""
    return event.ended if isinstance(event, IterationEvent) else event.at


class TraceBuffer:
    """What one process records. Any thread may call any method."""

    def __init__(
        self, name: str, capacity: int = DEFAULT_CAPACITY, *, always: bool = False
    ) -> None:
        """`always`: record from the start and never stop, as the configuration may ask."""
        self.name = name
        self.always = always
        self.recording = False
        self.since = 0.0
        """When recording began; meaningful while `recording`."""
        self._until = 0.0
        self._events: deque[Event] = deque(maxlen=capacity)
        if always:
            self.record(float("inf"))

    def record(self, seconds: float) -> None:
        """Record for `seconds` from now, or as much longer as was asked before; 0 stops."""
        now = time.monotonic()
        self._expire(now)
        if seconds > 0:
            self._until = max(self._until, now + seconds) if self.recording else now + seconds
            if not self.recording:
                self._events.clear()
                self.since = now
                self.recording = True
        elif not self.always:
            self.recording = False

    def events(self, since: float) -> list[Event]:
        """Return what is kept of everything from `since` on, in the order of recording."""
        self._expire(time.monotonic())
        return [event for event in self._snapshot() if time_of(event) >= since]

    @property
    def complete_from(self) -> float:
        """From when on nothing was lost: the start, or the oldest event once the ring is full."""
        events = self._snapshot()
        full = len(events) == self._events.maxlen
        return time_of(events[0]) if full else self.since

    # ---- hooks

    def stage(self, request: str, name: StageName, at: float | None = None) -> None:
        """A request passed a boundary, now or at a time that was noted."""
        if self.recording:
            when = time.monotonic() if at is None else at
            self._events.append(StageEvent(when, request, name))

    def iteration(self, plan: IterationPlan, began: float, ended: float) -> None:
        """An iteration is over."""
        if self.recording:
            self._events.append(IterationEvent(began, ended, parts_of(plan)))
            self._expire(ended)

    def leg(self, request: str, leg_id: int) -> None:
        """A leg of a request begins."""
        if self.recording:
            self._events.append(LegEvent(time.monotonic(), request, leg_id))

    def sent(
        self, peer: str, piece: PieceRef, began: float, packed: float, announced: float
    ) -> None:
        """A piece was handed to the wire."""
        if self.recording:
            at = time.monotonic()
            self._events.append(SentEvent(at, peer, piece, began, packed, announced))

    def landed(self, peer: str, piece: PieceRef) -> None:
        """A piece was scattered into its blocks."""
        if self.recording:
            self._events.append(LandedEvent(time.monotonic(), peer, piece))

    # ---- inside

    def _expire(self, now: float) -> None:
        if self.recording and now > self._until:
            self.recording = False

    def _snapshot(self) -> list[Event]:
        """A copy; other threads append meanwhile, and the copy starts again if one of them did."""
        while True:
            try:
                return list(self._events.copy())
            except RuntimeError:
                continue
