"""Virtual time: actions in the order of their times, equal times in the order of asking."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any

Action = Callable[..., None]


class Clock:
    """A discrete-event loop. `now` moves only between actions, and never back."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = count()
        self._events: list[tuple[float, int, Action, tuple[Any, ...]]] = []

    def at(self, time: float, action: Action, *args: Any) -> None:
        """Run `action(*args)` at `time`, or at once if that has passed."""
        when = time if time > self.now else self.now
        heappush(self._events, (when, next(self._numbers), action, args))

    def after(self, seconds: float, action: Action, *args: Any) -> None:
        """Run `action(*args)` so many seconds from now, 0 or more."""
        heappush(self._events, (self.now + seconds, next(self._numbers), action, args))

    def run(self) -> None:
        """Run until nothing is left to happen."""
        events = self._events
        while events:
            self.now, _, action, args = heappop(events)
            action(*args)
