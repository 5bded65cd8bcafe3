"""What a router believes to be in the workers' prefix caches: what it sent them, and what they say.

One map for all workers of a pool, block hash -> who holds it, so that looking a prompt up costs one
step per block and not one per worker. Workers are numbers here, and a set of them is the bits of an
integer.

Invariant: never more than `capacity` hashes per worker; the least recently recorded go first,
deeper blocks of a chain before their parents, so that what is left is still a run from the start.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

Depths = np.ndarray[tuple[int], np.dtype[np.int64]]


class PrefixIndex:
    """Block hashes in order of last use for each worker, and the workers of each hash."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: dict[int, OrderedDict[bytes, None]] = {}
        self._holders: dict[bytes, int] = {}

    def num_known(self, worker: int) -> int:
        """Hashes that are remembered of a worker."""
        return len(self._known.get(worker, ()))

    def match(self, worker: int, hashes: Sequence[bytes]) -> int:
        """Return how many of the first `hashes` in a row one worker has. O(length of the run)."""
        known = self._known.get(worker, OrderedDict())
        for count, block_hash in enumerate(hashes):
            if block_hash not in known:
                return count
        return len(hashes)

    def depths(self, hashes: Sequence[bytes], num_workers: int) -> Depths:
        """Return `match` of workers 0 to `num_workers` - 1, all at once.

        O(length of the longest run) and one pass over the workers each time that the set of those
        who have the run so far grows smaller.
        """
        depths = np.zeros(num_workers, dtype=np.int64)
        having, since = (1 << num_workers) - 1, 0
        for count, block_hash in enumerate(hashes):
            still_having = having & self._holders.get(block_hash, 0)
            if still_having != having:
                _deepen(depths, having, count - since)
                having, since = still_having, count
                if not having:
                    return depths
        _deepen(depths, having, len(hashes) - since)
        return depths

    def record(self, worker: int, hashes: Sequence[bytes]) -> None:
        """Note that a worker is about to hold these blocks."""
        known = self._known.setdefault(worker, OrderedDict())
        bit = 1 << worker
        for block_hash in reversed(hashes[: self._capacity]):
            if block_hash in known:
                known.move_to_end(block_hash)
            else:
                known[block_hash] = None
                self._holders[block_hash] = self._holders.get(block_hash, 0) | bit
        while len(known) > self._capacity:
            self._let_go(known.popitem(last=False)[0], bit)

    def has(self, worker: int, block_hash: bytes) -> bool:
        """Whether a worker holds one block."""
        return block_hash in self._known.get(worker, ())

    def all_of(self, worker: int) -> list[bytes]:
        """Return what a worker holds, least recently recorded first."""
        return list(self._known.get(worker, ()))

    def drop(self, worker: int, hashes: Iterable[bytes]) -> None:
        """Note that a worker no longer holds these blocks."""
        known = self._known.get(worker)
        if known is None:
            return
        for block_hash in hashes:
            if known.pop(block_hash, self) is None:
                self._let_go(block_hash, 1 << worker)

    def forget(self, worker: int) -> None:
        """Note that a worker is gone and what it held with it."""
        for block_hash in self._known.pop(worker, ()):
            self._let_go(block_hash, 1 << worker)

    def _let_go(self, block_hash: bytes, bit: int) -> None:
        left = self._holders[block_hash] & ~bit
        if left:
            self._holders[block_hash] = left
        else:
            del self._holders[block_hash]


def _deepen(depths: Depths, workers: int, blocks: int) -> None:
    """Add `blocks` to the depth of every worker whose bit is set."""
    if blocks:
        packed = np.frombuffer(workers.to_bytes(-(-len(depths) // 8), "little"), dtype=np.uint8)
        depths += blocks * np.unpackbits(packed, count=len(depths), bitorder="little").astype(int)
