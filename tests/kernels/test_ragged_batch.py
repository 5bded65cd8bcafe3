"""Rows, positions and slots of a ragged batch."""

from __future__ import annotations

import pytest
import torch

from tandem_kernels import RaggedBatch


def test_rows_follow_the_block_tables() -> None:
    batch = RaggedBatch.build([[7, 3], [5], [9, 1, 2]], [2, 0, 8], [4, 3, 1], block_size=4)
    assert batch.query_starts == (0, 4, 7, 8)
    assert batch.context_lens == (6, 3, 9)
    assert batch.positions.tolist() == [2, 3, 4, 5, 0, 1, 2, 8]
    assert batch.slots.tolist() == [30, 31, 12, 13, 20, 21, 22, 8]
    assert batch.block_tables.tolist() == [[7, 3, 7], [5, 5, 5], [9, 1, 2]]
    assert batch.positions.dtype == batch.slots.dtype == torch.int64


def test_blocks_past_the_end_are_left_out() -> None:
    batch = RaggedBatch.build([[7, 3, 6, 8]], [0], [5], block_size=4)
    assert batch.block_tables.tolist() == [[7, 3]]


def test_a_table_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="1 blocks does not cover 2"):
        RaggedBatch.build([[0]], [3], [2], block_size=4)
