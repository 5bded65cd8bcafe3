"""The sampling parameters of a batch as columns on the device, kept while the batch stays the same.

What changes in every iteration are the positions, and what follows from a sequence's tokens:
min_tokens and penalties.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.engine.token_counts import TokenCountsCache
from tandem_kernels import upload

_MIN_TEMPERATURE = 1e-6
"""Below it a draw equals the greedy choice; dividing by less would overflow."""

Positions = np.ndarray[tuple[int], np.dtype[np.int64]]


class Edits(NamedTuple):
    """What is added to single logits. All [edits]."""

    rows: Tensor
    token_ids: Tensor
    amounts: Tensor


class Penalties(NamedTuple):
    """As `apply_penalties` takes them, for some rows of the batch."""

    rows: Tensor
    token_ids: Tensor
    output_counts: Tensor
    factors: Tensor
    """float32 [rows, 3]: repetition, presence, frequency."""


@dataclass(frozen=True)
class SamplingColumns:
    """What one draw for each row of a batch depends on beside the logits."""

    random_rows: Tensor | None
    """int64: the rows that are not greedy, which the next four are of; None: every row."""
    temperatures: Tensor
    seeds: Tensor
    positions: Tensor
    truncation: tuple[Tensor, Tensor, Tensor] | None
    """top_k, top_p, min_p, if any row has one."""
    asking: tuple[int, ...]
    """Rows whose log-probabilities are asked for, and how many alternatives each wants."""
    num_logprobs: tuple[int, ...]
    asking_rows: Tensor | None
    """`asking` on the device; None: every row."""
    edits: Edits | None = None
    penalties: Penalties | None = None


class SamplingBatch:
    """Makes the columns, reusing those of the iteration before for the same sequences."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids
        self._token_counts = TokenCountsCache()
        self._sequences: Rows[Sequence] = ()
        self._columns: SamplingColumns | None = None
        self._random: list[int] = []
        self._edited: list[int] = []
        self._penalised: list[int] = []

    def columns(
        self, sequences: Rows[Sequence], positions: Positions, device: torch.device
    ) -> SamplingColumns:
        """Return the columns; `positions[row]` is the index that the row's new token gets."""
        if self._columns is None or self._sequences != sequences:
            self._columns = self._make(sequences, device)
            self._sequences = sequences
        at = positions if self._columns.random_rows is None else positions[self._random]
        columns = replace(self._columns, positions=upload(at, device))
        if self._edited:
            columns = replace(columns, edits=self._edits(sequences, positions, device))
        if self._penalised:
            columns = replace(columns, penalties=self._penalties(sequences, device))
        return columns

    def _make(self, sequences: Rows[Sequence], device: torch.device) -> SamplingColumns:
        params = [seq.request.sampling for seq in sequences]
        self._random = [row for row, sampling in enumerate(params) if not sampling.greedy]
        self._edited = [row for row, p in enumerate(params) if p.logit_bias or p.min_tokens]
        self._penalised = [row for row, sampling in enumerate(params) if sampling.penalises]
        drawn = [params[row] for row in self._random]
        scales = (max(p.temperature, _MIN_TEMPERATURE) for p in drawn)
        asking = tuple(row for row, p in enumerate(params) if p.logprobs is not None)
        return SamplingColumns(
            random_rows=_unless_all(self._random, len(params), device),
            temperatures=_column(scales, np.float32, device),
            seeds=_column((_as_int64(p.seed) for p in drawn), np.int64, device),
            positions=_column((), np.int64, device),
            truncation=_truncation(drawn, device),
            asking=asking,
            num_logprobs=tuple(params[row].logprobs or 0 for row in asking),
            asking_rows=_unless_all(asking, len(params), device),
        )

    def _edits(
        self, sequences: Rows[Sequence], positions: Positions, device: torch.device
    ) -> Edits | None:
        """Biases, and -inf for tokens that may not end a sequence yet.

        While a sequence is shorter than min_tokens, every id that could stop it is forbidden: the
        model's end-of-sequence ids, with ignore_eos too, and its own stop_token_ids.
        """
        edits: list[tuple[int, int, float]] = []
        for row in self._edited:
            request = sequences[row].request
            sampling = request.sampling
            edits.extend((row, token_id, bias) for token_id, bias in sampling.logit_bias.items())
            if positions[row] - request.prompt_len < sampling.min_tokens:
                forbidden = {*self._eos_token_ids, *sampling.stop_token_ids}
                edits.extend((row, token_id, float("-inf")) for token_id in forbidden)
        if not edits:
            return None
        rows, token_ids, amounts = zip(*edits, strict=True)
        return Edits(
            _column(rows, np.int64, device),
            _column(token_ids, np.int64, device),
            _column(amounts, np.float32, device),
        )

    def _penalties(self, sequences: Rows[Sequence], device: torch.device) -> Penalties:
        penalised = [sequences[row] for row in self._penalised]
        token_ids, output_counts = self._token_counts.batch(penalised, device)
        params = (seq.request.sampling for seq in penalised)
        factors = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        return Penalties(
            _column(self._penalised, np.int64, device),
            token_ids,
            output_counts,
            upload(np.array(factors, dtype=np.float32), device),
        )


def _truncation(
    params: Rows[SamplingParams], device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
        return None
    return (
        _column((p.top_k for p in params), np.int64, device),
        _column((p.top_p for p in params), np.float64, device),
        _column((p.min_p for p in params), np.float32, device),
    )


def _unless_all(rows: Rows[int], count: int, device: torch.device) -> Tensor | None:
    return None if len(rows) == count else _column(rows, np.int64, device)


def _column(values: Iterable[float], dtype: Any, device: torch.device) -> Tensor:
    return upload(np.array(list(values), dtype=dtype), device)


def _as_int64(seed: int) -> int:
    """The two's complement of an unsigned 64-bit seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
