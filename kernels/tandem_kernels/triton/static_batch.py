"""A decode batch in buffers that never move, so that a captured graph can read the next one there.

Row i belongs to sequence i. Rows past those in use are padding: context 0 and slot -1, for which
the kernels neither write KV nor read any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_kernels.ragged_batch import RaggedBatch
from tandem_kernels.triton.paged_attention import AttentionPlan

_TOKEN, _POSITION, _SLOT, _CONTEXT = range(4)


class StaticDecodeBatch:
    """Up to `max_rows` sequences of up to `max_tokens` tokens, one query each."""

    def __init__(
        self, max_rows: int, max_tokens: int, block_size: int, device: torch.device
    ) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self._block_size = block_size
        width = -(-max_tokens // block_size)
        self._columns = torch.zeros((4, max_rows), dtype=torch.int64, device=device)
        self._columns[_SLOT] = -1
        self._tables = torch.zeros((max_rows, width), dtype=torch.int64, device=device)
        self._rows = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._ones = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._none = torch.zeros(0, dtype=torch.int32, device=device)

    def fill(self, token_ids: Tensor, batch: RaggedBatch) -> None:
        """Lay the next iteration out, from tensors on the device: one token of each sequence.

        Queued behind the last iteration that reads the buffers; nothing comes from the host.
        """
        count, width = batch.block_tables.shape
        self._tables[:count, :width].copy_(batch.block_tables)
        self._columns[_TOKEN, :count] = token_ids
        self._columns[_POSITION, :count] = batch.positions
        self._columns[_SLOT, :count] = batch.slots
        self._columns[_CONTEXT, :count] = batch.positions + 1
        self._columns[:, count:] = 0
        self._columns[_SLOT, count:] = -1

    def token_ids(self, rows: int) -> Tensor:
        """int64 [rows]"""
        return self._columns[_TOKEN, :rows]

    def ragged(self, rows: int) -> RaggedBatch:
        """The first rows as a batch; its context lengths are read when this is called, on the
        device."""
        batch = RaggedBatch(
            query_starts=tuple(range(rows + 1)),
            context_lens=(self.max_tokens,) * rows,
            block_tables=self._tables[:rows],
            block_size=self._block_size,
            positions=self._columns[_POSITION, :rows],
            slots=self._columns[_SLOT, :rows],
        )
        plan = AttentionPlan(
            context_lens=self._columns[_CONTEXT, :rows].to(torch.int32),
            query_starts=self._rows[:rows],
            query_lens=self._ones[:rows],
            decode_sequences=self._rows[:rows],
            longest_decode=self.max_tokens,
            tile_sequences=self._none,
            tile_offsets=self._none,
            tile_size=16,
        )
        plan.attach(batch)
        return batch
