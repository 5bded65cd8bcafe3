"""What became of the blocks that can be found by their prefix, for those who want to follow. Pure.

One journal per worker, one reader per follower. Invariant: a reader that has fallen behind what the
journal remembers starts over with a snapshot, so that nobody follows a journal with a hole in it.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Literal, NamedTuple

from tandem.core.prefix_events import KEY_BYTES, PrefixEvents
from tandem.kvcache.block_pool import BlockPool

Tier = Literal["device", "host"]
REMEMBERED = 65536
"""Changes that the journal keeps."""
PER_MESSAGE = 8192
"""Changes in one message, at most."""


class _Change(NamedTuple):
    key: bytes
    tier: Tier
    is_stored: bool


class PrefixJournal:
    """The changes in the pools of one worker, numbered from 0."""

    def __init__(self, device: BlockPool, host: BlockPool | None) -> None:
        self.pools: dict[Tier, BlockPool] = {"device": device}
        if host is not None:
            self.pools["host"] = host
        self.changes: deque[_Change] = deque(maxlen=REMEMBERED)
        self.end = 0
        """The number of the next change."""
        for tier, pool in self.pools.items():
            pool.prefixes.listeners.append(_Listener(self, tier))

    def note(self, block_hash: bytes, tier: Tier, *, is_stored: bool) -> None:
        """Append a change."""
        self.changes.append(_Change(block_hash[:KEY_BYTES], tier, is_stored))
        self.end += 1


class _Listener:
    """Writes down what one pool says."""

    def __init__(self, journal: PrefixJournal, tier: Tier) -> None:
        self._journal = journal
        self._tier: Tier = tier

    def published(self, block_hash: bytes) -> None:
        self._journal.note(block_hash, self._tier, is_stored=True)

    def cached(self, block: int) -> None:
        return

    def evicted(self, block_hash: bytes) -> None:
        self._journal.note(block_hash, self._tier, is_stored=False)


class JournalReader:
    """One follower's place. The first message is a snapshot's beginning."""

    def __init__(self, journal: PrefixJournal) -> None:
        self._journal = journal
        self._number = 0
        self.restart()

    def restart(self) -> None:
        """Begin again with a snapshot: the follower has lost its place."""
        self._snapshot: list[_Change] | None = None
        self._next = -1

    def read(self, host_value: float, *, even_if_empty: bool = False) -> PrefixEvents | None:
        """Return the next message, or None if there is nothing to say and nothing must be said."""
        journal = self._journal
        reset = self._next < journal.end - len(journal.changes)
        if reset:
            self._snapshot = [
                _Change(block_hash[:KEY_BYTES], tier, is_stored=True)
                for tier, pool in journal.pools.items()
                for block_hash in pool.prefixes.hashes()
            ]
            self._next = journal.end
        changes = self._take()
        if not (reset or changes or even_if_empty):
            return None
        self._number += 1
        chosen: dict[tuple[Tier, bool], list[bytes]] = {}
        last = {(change.tier, change.key): change for change in changes}
        for change in last.values():
            chosen.setdefault((change.tier, change.is_stored), []).append(change.key)
        return PrefixEvents(
            self._number,
            reset,
            tuple(chosen.get(("device", True), ())),
            tuple(chosen.get(("device", False), ())),
            tuple(chosen.get(("host", True), ())),
            tuple(chosen.get(("host", False), ())),
            host_value,
        )

    def _take(self) -> list[_Change]:
        """What is left of the snapshot comes first, then what has changed since."""
        if self._snapshot:
            taken, self._snapshot = self._snapshot[:PER_MESSAGE], self._snapshot[PER_MESSAGE:]
            return taken
        journal = self._journal
        first = self._next - (journal.end - len(journal.changes))
        taken = list(islice(journal.changes, first, first + PER_MESSAGE))
        self._next += len(taken)
        return taken
