"""Health means progress, not an open port. Pure: the caller brings the time."""

from __future__ import annotations

from tandem.core.errors import DeadlineExceededError, StaleError


class ProgressWatch:
    """Watches a peer's iteration counter while it has work."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._iterations = -1
        self._since = 0.0

    def observe(self, iterations: int, has_work: bool, now: float) -> bool:
        """Note a heartbeat; returns whether there was an iteration since the one before.

        Raises `DeadlineExceededError` after `timeout` seconds without one while there is work.
        """
        moved = iterations != self._iterations
        if moved or not has_work:
            self._iterations, self._since = iterations, now
        elif now - self._since > self._timeout:
            raise DeadlineExceededError(
                f"no iteration for {now - self._since:.0f} s while work is waiting"
            )
        return moved


def check_incarnation(name: str, expected: int, actual: int) -> None:
    """Raise `StaleError` when a peer means another incarnation of this worker."""
    if expected != actual:
        raise StaleError(f"{name}: expected incarnation {expected}, this is {actual}")
