"""What a router believes to be in one worker's prefix cache. A belief: the worker knows better.

Invariant: never more than `capacity` hashes; the least recently recorded go first, deeper blocks of
a chain before their parents, so that what is left is still a run from the start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """A bounded set of block hashes in order of last use."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Return how many of the first `hashes` in a row are known. O(length of the run)."""
        for count, block_hash in enumerate(hashes):
            if block_hash not in self._known:
                return count
        return len(hashes)

    def record(self, hashes: Sequence[bytes]) -> None:
        """Note that the worker is about to hold these blocks."""
        for block_hash in reversed(hashes[: self._capacity]):
            self._known[block_hash] = None
            self._known.move_to_end(block_hash)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
