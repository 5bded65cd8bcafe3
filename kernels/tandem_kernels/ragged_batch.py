"""Which rows of an iteration belong to which sequence, and where each sequence's KV lies.

Made once per iteration and read by every layer. Rows are the iteration's tokens, sequence after
sequence, with no padding. Holds indices only, never activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tandem_kernels.upload import upload

Integers = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """The shape of one iteration over S sequences and T tokens."""

    query_starts: tuple[int, ...]
    """S + 1 row numbers: sequence i has rows query_starts[i] to query_starts[i + 1]."""
    context_lens: tuple[int, ...]
    """S: tokens of each sequence whose KV is in place once this iteration's is written."""
    block_tables: Tensor
    """int64 [S, widest table], filled up with each table's first block."""
    block_size: int
    positions: Tensor
    """int64 [T]: index of each row's token in its sequence."""
    slots: Tensor
    """int64 [T]: where the KV of each row's token goes."""
    derived: dict[object, object] = field(default_factory=dict)
    """What an operation worked out from the fields above, kept for the iteration's other layers."""

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @classmethod
    def build(
        cls,
        block_tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        lengths: Sequence[int],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> RaggedBatch:
        """Lay out tokens [start, start + length) of each sequence. Tables must cover them all."""
        first = np.asarray(starts, dtype=np.int64)
        counts = np.asarray(lengths, dtype=np.int64)
        tables = _padded_tables(block_tables, -(-(first + counts) // block_size))
        return cls.over(upload(tables, device), first, counts, block_size)

    @classmethod
    def over(
        cls,
        block_tables: Tensor,
        starts: Integers,
        lengths: Integers,
        block_size: int,
    ) -> RaggedBatch:
        """As `build`, over tables that are on the device already, int64 [S, widest table]."""
        query_starts = np.concatenate(([0], np.cumsum(lengths)))
        if (lengths == 1).all():
            sequence_of_row, positions = np.arange(len(lengths)), starts
        else:
            sequence_of_row = np.repeat(np.arange(len(lengths)), lengths)
            positions = np.arange(query_starts[-1]) + np.repeat(starts - query_starts[:-1], lengths)
        on_device = _positions_and_slots(block_tables, sequence_of_row, positions, block_size)
        return cls(
            query_starts=tuple(query_starts.tolist()),
            context_lens=tuple((starts + lengths).tolist()),
            block_tables=block_tables,
            block_size=block_size,
            positions=on_device[0],
            slots=on_device[1],
        )


def _positions_and_slots(
    block_tables: Tensor, sequence_of_row: Integers, positions: Integers, block_size: int
) -> tuple[Tensor, Tensor]:
    """Return both for each row, where the tables are. On CPUs by numpy, which takes less time over
    so few numbers than torch does."""
    if block_tables.device.type == "cpu":
        blocks = block_tables.numpy()[sequence_of_row, positions // block_size]
        slots = blocks * block_size + positions % block_size
        return torch.from_numpy(positions), torch.from_numpy(slots)
    index = upload(np.stack((positions, sequence_of_row)), block_tables.device)
    on_device = block_tables[index[1], index[0] // block_size]
    return index[0], on_device * block_size + index[0] % block_size


def _padded_tables(
    block_tables: Sequence[Sequence[int]], blocks_needed: Integers
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Stack the used part of each table. Padding repeats the table's own first block.

    A padded block is masked, never another sequence's business: should one sequence's KV hold a
    NaN, no other reads it.
    """
    tables = np.empty((len(block_tables), int(blocks_needed.max(initial=0))), dtype=np.int64)
    for row, table, needed in zip(tables, block_tables, blocks_needed.tolist(), strict=True):
        if len(table) < needed:
            raise ValueError(
                f"a block table of {len(table)} blocks does not cover {needed} blocks of tokens"
            )
        row[:needed] = table[:needed]
        row[needed:] = table[0] if needed else 0
    return tables
