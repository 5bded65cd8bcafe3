"""Prefill workers that failed a moment ago and are better avoided. Pure: the caller has the clock.

A suspicion fades by itself, so that one bad transfer never shuts out a healthy worker, and is void
at once for a new incarnation.
"""

from __future__ import annotations

from collections.abc import Mapping

from tandem.gateway.dispatch.view import Member


class Suspects:
    """Names under suspicion, each with the incarnation that earned it and an expiry."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[str, tuple[int, float]] = {}

    def add(self, member: Member, now: float) -> None:
        """Avoid this incarnation for a while."""
        self._until[member.name] = (member.incarnation, now + self._seconds)

    def keep(self, members: Mapping[str, Member]) -> None:
        """Forget those that left or came back under a new incarnation."""
        self._until = {
            name: (incarnation, until)
            for name, (incarnation, until) in self._until.items()
            if name in members and members[name].incarnation == incarnation
        }

    def current(self, now: float) -> set[str]:
        """Return the names that are still to be avoided."""
        self._until = {name: entry for name, entry in self._until.items() if entry[1] > now}
        return set(self._until)
