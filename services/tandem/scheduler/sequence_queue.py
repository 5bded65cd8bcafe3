"""A queue of sequences in the order in which they are served. No policy lives here.

Invariant: sorted by `Sequence.order`, which never changes while a sequence is queued.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from tandem.core.sequence import Sequence

_order = attrgetter("order")


class SequenceQueue:
    """Sequences, first served first. Finding one is O(log n); moving the rest up is a memmove."""

    def __init__(self) -> None:
        self._items: list[Sequence] = []
        self.num_changes = 0
        """How often somebody came or went."""

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __contains__(self, seq: object) -> bool:
        return isinstance(seq, Sequence) and self._index(seq) is not None

    @property
    def first(self) -> Sequence:
        """The one that is served first. Raises IndexError when empty."""
        return self._items[0]

    @property
    def last(self) -> Sequence:
        """The one that is served last: the youngest of the lowest class."""
        return self._items[-1]

    def add(self, seq: Sequence) -> None:
        """Put a sequence at the place that its order gives it."""
        insort(self._items, seq, key=_order)
        self.num_changes += 1

    def discard(self, seq: Sequence) -> None:
        """Take a sequence out, if it is here."""
        index = self._index(seq)
        if index is not None:
            del self._items[index]
            self.num_changes += 1

    def _index(self, seq: Sequence) -> int | None:
        index = bisect_left(self._items, seq.order, key=_order)
        while index < len(self._items) and self._items[index].order == seq.order:
            if self._items[index] is seq:
                return index
            index += 1
        return None
