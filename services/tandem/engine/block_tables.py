"""The block tables of the sequences that compute, kept on the device between iterations.

A row per slot. A row is written when its slot is new and a cell when the table grows, so that an
iteration costs what changed since the last one.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from tandem.core.sequence import Sequence
from tandem.engine.slots import Integers
from tandem_kernels import upload

Pairs = np.ndarray[tuple[int, int], np.dtype[np.int64]]
_FIRST_WIDTH = 32


class BlockTables:
    """Rows of block ids on `device`."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._device = device
        self._cells = torch.zeros((num_slots, _FIRST_WIDTH), dtype=torch.int64, device=device)
        self._written = np.zeros(num_slots, dtype=np.int64)  # blocks of each row

    def extend(self, num_slots: int) -> None:
        """Have rows for so many slots."""
        self._resize(num_slots, self._cells.shape[1])

    def clear(self, slot: int) -> None:
        """Forget what is in a row: another table comes there."""
        self._written[slot] = 0

    def stack(
        self, sequences: Rows[Sequence], slots: Integers, index: Tensor, needed: Integers
    ) -> Tensor:
        """Return the first blocks of each sequence, int64 [sequences, max(needed)], on the device.

        `index` is `slots` on the device. Row i holds `needed[i]` blocks; what follows them are
        blocks of its own table, never another's. A copy: later calls do not change it. Raises
        `ValueError` for a table that has fewer blocks than needed.
        """
        lacking = np.flatnonzero(self._written[slots] < needed).tolist()
        if lacking:
            self._write(
                [(int(slots[i]), sequences[i].block_table, int(needed[i])) for i in lacking]
            )
        return self._cells[:, : int(needed.max(initial=0))].index_select(0, index)

    def _resize(self, num_slots: int, width: int) -> None:
        old_slots, old_width = self._cells.shape
        cells = torch.zeros((num_slots, width), dtype=torch.int64, device=self._device)
        cells[:old_slots, :old_width] = self._cells
        if width > old_width:  # a blank is a block of the row's own table
            cells[:old_slots, old_width:] = self._cells[:, :1]
        self._cells = cells
        self._written = np.concatenate((self._written, np.zeros(num_slots - old_slots, np.int64)))

    def _write(self, lacking: Rows[tuple[int, Rows[int], int]]) -> None:
        """Write what (slot, table, blocks needed) lack, in one copy to the device."""
        widest = max(len(table) for _, table, _ in lacking)
        if widest > self._cells.shape[1]:
            self._resize(len(self._written), max(widest, 2 * self._cells.shape[1]))
        width = self._cells.shape[1]
        index: list[int] = []
        blocks: list[int] = []
        new: list[Pairs] = []  # whole rows, blanks included
        for slot, table, needed in lacking:
            if len(table) < needed:
                raise ValueError(
                    f"a block table of {len(table)} blocks does not cover {needed} blocks of tokens"
                )
            written = int(self._written[slot])
            if written:
                index.extend(range(slot * width + written, slot * width + len(table)))
                blocks.extend(table[written:])
            else:
                new.append(_row(slot * width, width, table))
        grown = np.array((index, blocks), dtype=np.int64)
        changes = upload(np.concatenate((grown, *new), axis=1) if new else grown, self._device)
        self._cells.view(-1).index_copy_(0, changes[0], changes[1])
        for slot, table, _ in lacking:
            self._written[slot] = len(table)


def _row(first_cell: int, width: int, table: Rows[int]) -> Pairs:
    """Return (cell, block) for every cell of a row, int64 [2, width]."""
    row = np.full((2, width), table[0], dtype=np.int64)
    row[0] = np.arange(first_cell, first_cell + width)
    row[1, : len(table)] = table
    return row
