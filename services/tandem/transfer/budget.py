"""How many links one worker keeps open, and which gives way when another is needed.

Counts the links that this worker opened (a link is closed only by the side that opened it).
Invariants: never more than `max_links` open; links are granted in the order in which they were
asked for; no callback runs under the lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class BudgetedLink(Protocol):
    """A link that can be asked to close."""

    def give_way(self) -> None:
        """Close as soon as nothing is unacknowledged. Must not block."""


@dataclass(slots=True)
class _Slot:
    opened_at: float
    idle_since: float | None = None
    asked: bool = False
    """It has been told to give way."""


class LinkBudget:
    """Open links of one worker, shared by its peers.

    When none is free, the least recently used idle link is asked to give way; when all are busy,
    the one that has been open longest, once its turn is over: it sends no new piece until it has
    closed and been granted a place again, so a link that is never idle starves nobody.
    """

    def __init__(self, max_links: int, turn_seconds: float = 1.0) -> None:
        self.max_links = max_links
        self._turn_seconds = turn_seconds
        self._changed = threading.Condition()
        self._open: dict[BudgetedLink, _Slot] = {}
        self._waiting: deque[BudgetedLink] = deque()

    @property
    def num_open(self) -> int:
        with self._changed:
            return len(self._open)

    @property
    def num_waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    def acquire(self, link: BudgetedLink, wanted: Callable[[], bool]) -> bool:
        """Block the calling transfer thread until the link may open; False if not `wanted`."""
        with self._changed:
            self._waiting.append(link)
        try:
            while True:
                with self._changed:
                    if not wanted():
                        return False
                    first = self._waiting[0] is link
                    if first and len(self._open) < self.max_links:
                        self._open[link] = _Slot(time.monotonic())
                        return True
                    victim = self._pick() if first else None
                    if victim is None:
                        self._changed.wait(self._turn_seconds)
                if victim is not None:
                    victim.give_way()
        finally:
            with self._changed:
                self._waiting.remove(link)
                self._changed.notify_all()

    def release(self, link: BudgetedLink) -> None:
        """The link has closed."""
        with self._changed:
            self._open.pop(link, None)
            self._changed.notify_all()

    def set_idle(self, link: BudgetedLink, idle: bool) -> None:
        """The link ran out of work, or has work again."""
        with self._changed:
            slot = self._open.get(link)
            if slot is None or idle == (slot.idle_since is not None):
                return
            slot.idle_since = time.monotonic() if idle else None
            if idle and self._waiting:
                self._changed.notify_all()

    def wake(self) -> None:
        """Let every `acquire` look at its `wanted` again."""
        with self._changed:
            self._changed.notify_all()

    def _pick(self) -> BudgetedLink | None:
        idle = [
            (slot.idle_since, link)
            for link, slot in self._open.items()
            if slot.idle_since is not None
        ]
        if idle:
            victim = min(idle, key=lambda pair: pair[0])[1]
            if self._open[victim].asked:
                return None  # it is closing; its place is next
        elif any(slot.asked for slot in self._open.values()):
            return None
        else:
            victim = min(self._open, key=lambda link: self._open[link].opened_at)
            if time.monotonic() - self._open[victim].opened_at < self._turn_seconds:
                return None
        self._open[victim].asked = True
        return victim
