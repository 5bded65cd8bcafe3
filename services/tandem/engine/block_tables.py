"""The block tables of the sequences that compute, kept on the device between iterations.

A cache: a row is written when its table is first seen and a cell when the table grows, so that an
iteration costs what changed since the last one. Whatever is dropped here is written again.
Invariant: block tables are lists that only grow while they are in use; a sequence that loses its
blocks gets a new list.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from tandem_kernels import upload

Integers = np.ndarray[tuple[int], np.dtype[np.int64]]
_FIRST_ROWS, _FIRST_WIDTH = 16, 32


class BlockTables:
    """Rows of block ids on `device`, found by the identity of the list that they mirror."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cells = torch.zeros((_FIRST_ROWS, _FIRST_WIDTH), dtype=torch.int64, device=device)
        self._lists: list[Rows[int] | None] = [None] * _FIRST_ROWS
        self._written = np.zeros(_FIRST_ROWS, dtype=np.int64)
        self._free = list(reversed(range(_FIRST_ROWS)))
        self._row_of: dict[int, int] = {}  # id of a list that `_lists` keeps alive
        self._last: tuple[list[int], Tensor] = ([], torch.zeros(0, dtype=torch.int64))

    def stack(self, tables: Rows[Rows[int]], needed: Integers) -> Tensor:
        """Return the first blocks of each table, int64 [tables, max(needed)], on the device.

        Row i holds `needed[i]` blocks; what follows them are blocks of its own table, never
        another's. A copy: later calls do not change it. Raises `ValueError` for a table that has
        fewer blocks than needed.
        """
        if not tables:
            return torch.zeros((0, 0), dtype=torch.int64, device=self._device)
        rows = self._rows(tables)
        lacking = np.flatnonzero(self._written[rows] < needed)
        if len(lacking):
            self._write([(rows[i], tables[i], int(needed[i])) for i in lacking.tolist()])
        if rows != self._last[0]:
            self._last = (rows, upload(np.array(rows, dtype=np.int64), self._device))
        return self._cells[:, : int(needed.max())].index_select(0, self._last[1])

    def _rows(self, tables: Rows[Rows[int]]) -> list[int]:
        keys = list(map(id, tables))
        try:
            return list(map(self._row_of.__getitem__, keys))
        except KeyError:
            return self._admit(tables, keys)

    def _admit(self, tables: Rows[Rows[int]], keys: list[int]) -> list[int]:
        """Give rows to the tables that have none, taking those of tables that do not compute."""
        new = [i for i, key in enumerate(keys) if key not in self._row_of]
        if len(new) > len(self._free):
            self._drop_all_but(set(keys))
        if len(new) > len(self._free):
            self._resize(2 * len(self._lists) + len(new), self._cells.shape[1])
        for i in new:
            row = self._free.pop()
            self._row_of[keys[i]] = row
            self._lists[row] = tables[i]
            self._written[row] = 0
        return list(map(self._row_of.__getitem__, keys))

    def _drop_all_but(self, keys: set[int]) -> None:
        for key in self._row_of.keys() - keys:
            row = self._row_of.pop(key)
            self._lists[row] = None
            self._free.append(row)

    def _resize(self, rows: int, width: int) -> None:
        old_rows, old_width = self._cells.shape
        cells = torch.zeros((rows, width), dtype=torch.int64, device=self._device)
        cells[:old_rows, :old_width] = self._cells
        if width > old_width:  # a blank is a block of the row's own table
            cells[:old_rows, old_width:] = self._cells[:, :1]
        self._cells = cells
        self._lists.extend([None] * (rows - old_rows))
        self._written = np.concatenate((self._written, np.zeros(rows - old_rows, np.int64)))
        self._free.extend(range(old_rows, rows))

    def _write(self, lacking: Rows[tuple[int, Rows[int], int]]) -> None:
        """Write what (row, table, blocks needed) lack, in one copy to the device."""
        widest = max(len(table) for _, table, _ in lacking)
        if widest > self._cells.shape[1]:
            self._resize(len(self._lists), max(widest, 2 * self._cells.shape[1]))
        width = self._cells.shape[1]
        index: list[int] = []
        blocks: list[int] = []
        for row, table, needed in lacking:
            if len(table) < needed:
                raise ValueError(
                    f"a block table of {len(table)} blocks does not cover {needed} blocks of tokens"
                )
            first = int(self._written[row])
            last = len(table) if first else width
            index.extend(range(row * width + first, row * width + last))
            blocks.extend(table[first:])
            if not first:
                blocks.extend([table[0]] * (width - len(table)))
            self._written[row] = len(table)
        changes = upload(np.array((index, blocks), dtype=np.int64), self._device)
        self._cells.view(-1)[changes[0]] = changes[1]
