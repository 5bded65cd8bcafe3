"""Which row of the batch state belongs to which sequence.

A sequence is known by its block table: a list that only grows while the sequence holds its blocks.
One that loses them gets a new list, and so a new slot. A slot is taken back when slots are short
and its sequence does not compute: forgetting one early costs writing it again, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from itertools import repeat

import numpy as np

Integers = np.ndarray[tuple[int], np.dtype[np.int64]]
NO_SLOTS: Integers = np.zeros(0, dtype=np.int64)
_FIRST_SLOTS = 16


class Slots:
    """Slots by the identity of the block tables that they are for."""

    def __init__(self) -> None:
        self._tables: list[Rows[int] | None] = [None] * _FIRST_SLOTS
        self._free = list(reversed(range(_FIRST_SLOTS)))
        self._last: tuple[list[int], Integers] = ([], NO_SLOTS)
        self._slot_of: dict[int, int] = {}  # id of a list that `_tables` keeps alive

    def __len__(self) -> int:
        return len(self._tables)

    def of(self, tables: Rows[Rows[int]]) -> tuple[Integers, list[int]]:
        """Return the slot of each table, int64 [tables], and the places of those that had none.

        Equal slots twice in a row are the same array.
        """
        slots = list(map(self._slot_of.get, map(id, tables), repeat(-1)))
        if slots == self._last[0]:
            return self._last[1], []
        as_array = np.array(slots, dtype=np.int64)
        new: list[int] = np.flatnonzero(as_array < 0).tolist()
        if new:
            self._make_room(len(new), tables)
        for place in new:
            slots[place] = as_array[place] = slot = self._free.pop()
            self._slot_of[id(tables[place])] = slot
            self._tables[slot] = tables[place]
        self._last = (slots, as_array)
        return as_array, new

    def _make_room(self, needed: int, tables: Rows[Rows[int]]) -> None:
        """Free slots of tables that are not in `tables`. Going through all of them pays only if it
        frees many: there are more slots than are in use, so that it is needed rarely."""
        if needed <= len(self._free):
            return
        for key in self._slot_of.keys() - set(map(id, tables)):
            slot = self._slot_of.pop(key)
            self._tables[slot] = None
            self._free.append(slot)
        spare = len(self._tables) // 2
        if len(self._free) < needed + spare:
            first, more = len(self._tables), len(self._tables) + needed
            self._tables.extend([None] * more)
            self._free.extend(reversed(range(first, first + more)))
