"""Whatever tables come, grow and go, what is stacked are their blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.block_tables import BlockTables


@given(
    rounds=st.lists(
        st.lists(
            st.tuples(st.integers(0, 30), st.integers(1, 50), st.booleans()),
            max_size=24,
            unique_by=lambda entry: entry[0],
        ),
        max_size=12,
    )
)
def test_rows_are_the_tables_whatever_was_there_before(
    rounds: list[list[tuple[int, int, bool]]],
) -> None:
    cache = BlockTables(torch.device("cpu"))
    tables: dict[int, list[int]] = {}
    fresh = iter(range(1, 10**6))
    for entries in rounds:
        for number, length, replaced in entries:
            if replaced:
                tables[number] = []  # it lost its blocks
            table = tables.setdefault(number, [])
            table.extend(next(fresh) for _ in range(length - len(table)))
        batch = [tables[number] for number, *_ in entries]
        needed = np.array([length for _, length, _ in entries], dtype=np.int64)
        stacked = cache.stack(batch, needed)
        for row, table, count in zip(stacked.tolist(), batch, needed.tolist(), strict=True):
            assert row[:count] == table[:count]
            assert set(row) <= set(table), "a blank is somebody else's block"


def test_a_table_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="does not cover"):
        BlockTables(torch.device("cpu")).stack([[1, 2]], np.array([3]))
