"""How fast a worker makes tokens, as `tandem status` shows it."""

from __future__ import annotations

_WINDOW_SECONDS = 5.0


class TokenRate:
    """Tokens per second over the last few seconds."""

    def __init__(self) -> None:
        self._began = 0.0
        self._count = 0
        self._last = 0.0

    def add(self, amount: int, now: float) -> None:
        """Count tokens; `now` is in seconds of a monotonic clock."""
        if now - self._began > _WINDOW_SECONDS:
            self._last = self.per_second(now)
            self._began, self._count = now, 0
        self._count += amount

    def per_second(self, now: float) -> float:
        """Return the rate; 0 after a long silence."""
        elapsed = now - self._began
        if elapsed > 2 * _WINDOW_SECONDS:
            return 0.0
        return self._count / elapsed if elapsed > 1.0 else self._last
