"""Notices that a worker is frozen: a silent stream, or one whose engine makes no progress.

Knows time only through the event loop and touches no stream; it calls back once. A process that was
itself stopped for a while must not blame its peers, so a check that comes late grants a new period.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Watchdog:
    """Calls `on_expire(detail)` once when a peer was silent, or busy but idle, for too long.

    One timer for each stream, set anew only when it fires: a message costs one clock reading.
    """

    def __init__(self, silence: float, stall: float, on_expire: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._silence = silence
        self._stall = stall
        self._on_expire = on_expire
        self._heard = self._progressed = self._loop.time()
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._arm()

    def heard(self) -> None:
        """Any message came."""
        self._heard = self._loop.time()

    def progressed(self) -> None:
        """The peer's engine has finished an iteration, or showed otherwise that work goes on."""
        self._progressed = self._loop.time()

    def set_busy(self, busy: bool) -> None:
        """Tell whether the peer has work of ours; only then must it make progress."""
        if busy and not self._busy:
            self._progressed = self._loop.time()
        self._busy = busy
        self._arm()

    def stop(self) -> None:
        """Never call back again. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _deadline(self) -> float:
        stalled = self._progressed + self._stall if self._busy else math.inf
        return min(self._heard + self._silence, stalled)

    def _arm(self) -> None:
        self.stop()
        self._timer = self._loop.call_at(self._deadline(), self._check, self._deadline())

    def _check(self, due: float) -> None:
        now = self._loop.time()
        if now - due > self._silence / 2:  # this process stood still: what came is not yet read
            self._heard = self._progressed = now
        if now >= self._heard + self._silence:
            self._expire(f"silent for {now - self._heard:.1f} s")
        elif self._busy and now >= self._progressed + self._stall:
            self._expire(f"no iteration for {now - self._progressed:.1f} s")
        else:
            self._arm()

    def _expire(self, detail: str) -> None:
        self.stop()
        self._on_expire(detail)
