"""Requests in flight that wait for a decode worker. Timers only; who dispatches them is `traffic`.

Invariant: a parked request leaves by `remove` or by its timeout, whichever is first, and takes its
timers with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.gateway.dispatch.flight import Flight


@dataclass(slots=True)
class _Place:
    flight: Flight
    pausing: bool
    timers: list[asyncio.TimerHandle] = field(default_factory=list)


class Parking:
    """First come, first served, except for those that are told to pause."""

    def __init__(
        self,
        timeout: float,
        on_due: Callable[[], None],
        on_timeout: Callable[[Flight], None],
    ) -> None:
        self._timeout = timeout
        self._on_due = on_due
        self._on_timeout = on_timeout
        self._places: dict[str, _Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def add(self, flight: Flight, pause: float) -> None:
        """Keep a request, for `pause` seconds at least and the timeout at most."""
        loop = asyncio.get_running_loop()
        place = _Place(flight, pausing=pause > 0)
        place.timers.append(loop.call_later(self._timeout, self._expire, flight))
        if place.pausing:
            place.timers.append(loop.call_later(pause, self._resume, place))
        self._places[flight.wire_id] = place

    def remove(self, flight: Flight) -> None:
        """Let a request go, if it is here."""
        place = self._places.pop(flight.wire_id, None)
        if place is not None:
            for timer in place.timers:
                timer.cancel()

    def due(self) -> list[Flight]:
        """Return those that may be dispatched now, the longest waiting first."""
        return [place.flight for place in self._places.values() if not place.pausing]

    def _resume(self, place: _Place) -> None:
        place.pausing = False
        self._on_due()

    def _expire(self, flight: Flight) -> None:
        self.remove(flight)
        self._on_timeout(flight)
