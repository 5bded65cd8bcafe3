"""The distinct tokens that a sequence holds and how often each is in its output, kept up to date.

Penalties need them at every step; counting the whole context again each time would cost more than
the step. Derived data only: whatever is dropped here is counted again from the sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from tandem.core.sequence import Sequence

_KEPT_SEQUENCES = 512


class TokenCounts:
    """Distinct tokens of one sequence, in order of first appearance."""

    def __init__(self) -> None:
        self._column_of: dict[int, int] = {}
        self._num_counted = 0
        self._token_ids = np.zeros(64, dtype=np.int64)
        self._output_counts = np.zeros(64, dtype=np.int64)

    def catch_up(self, seq: Sequence) -> None:
        """Count the tokens that were appended since the last call."""
        for index in range(self._num_counted, seq.num_tokens):
            column = self._column(seq.token_ids[index])
            if index >= seq.request.prompt_len:
                self._output_counts[column] += 1
        self._num_counted = seq.num_tokens

    @property
    def token_ids(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The distinct tokens."""
        return self._token_ids[: len(self._column_of)]

    @property
    def output_counts(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """How often each of them is in the output."""
        return self._output_counts[: len(self._column_of)]

    def _column(self, token_id: int) -> int:
        column = self._column_of.setdefault(token_id, len(self._column_of))
        if column == len(self._token_ids):
            more = np.zeros(column, dtype=np.int64)
            self._token_ids = np.concatenate((self._token_ids, more))
            self._output_counts = np.concatenate((self._output_counts, more))
        self._token_ids[column] = token_id
        return column


class TokenCountsCache:
    """The counts of the sequences that were sampled last."""

    def __init__(self, capacity: int = _KEPT_SEQUENCES) -> None:
        self._capacity = capacity
        self._counts: OrderedDict[Sequence, TokenCounts] = OrderedDict()

    def batch(self, sequences: Rows[Sequence], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return token ids and output counts, int64 [rows, widest], as `apply_penalties` takes
        them."""
        counts = [self._of(seq) for seq in sequences]
        shape = (len(counts), max(len(row.token_ids) for row in counts))
        token_ids, output_counts = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for index, row in enumerate(counts):
            width = len(row.token_ids)
            token_ids[index, :width], token_ids[index, width:] = row.token_ids, row.token_ids[0]
            output_counts[index, :width] = row.output_counts
            output_counts[index, width:] = row.output_counts[0]
        self._evict(len(counts))
        return torch.from_numpy(token_ids).to(device), torch.from_numpy(output_counts).to(device)

    def _of(self, seq: Sequence) -> TokenCounts:
        counts = self._counts.setdefault(seq, TokenCounts())
        self._counts.move_to_end(seq)
        counts.catch_up(seq)
        return counts

    def _evict(self, in_use: int) -> None:
        while len(self._counts) > max(self._capacity, in_use):
            self._counts.popitem(last=False)
