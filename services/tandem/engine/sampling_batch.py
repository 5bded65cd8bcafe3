"""The sampling parameters of the sequences that compute, and the columns of a batch on the device.

Parameters are read once, when their sequence comes, into arrays by slot. When a batch changes, its
columns are gathered by its slots and put on the device; they stay there as long as it is the same.
What changes in every iteration are the positions, and what follows from a sequence's tokens:
min_tokens and penalties.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.engine.slots import Integers
from tandem.engine.token_counts import TokenCountsCache
from tandem_kernels import upload

_MIN_TEMPERATURE = 1e-6
"""Below it a draw equals the greedy choice; dividing by less would overflow."""


_RANDOM, _TRUNCATES, _EDITS, _PENALISES, _ASKS, _ASKS_PROMPT = range(6)
"""What distinguishes some rows of a batch from the others."""


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


@dataclass(frozen=True, eq=False)
class _Layout:
    """What stays the same as long as a batch does."""

    slots: Integers
    columns: SamplingColumns
    random: Integers
    edited: list[int]
    penalised: list[int]


class SamplingBatch:
    """Makes the columns of a batch from what is kept by slot."""

    def __init__(
        self, eos_token_ids: tuple[int, ...], num_slots: int, device: torch.device
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._token_counts = TokenCountsCache()
        self._traits = np.zeros((6, num_slots), dtype=np.bool_)
        self._integers = np.zeros((3, num_slots), dtype=np.int64)
        """Seed, top_k, alternatives whose log-probabilities are asked for."""
        self._floats = np.zeros((2, num_slots), dtype=np.float32)
        """Temperature, min_p."""
        self._top_p = np.zeros((1, num_slots), dtype=np.float64)
        self._last: _Layout | None = None

    def extend(self, num_slots: int) -> None:
        """Have room for so many slots."""
        more = ((0, 0), (0, num_slots - self._traits.shape[1]))
        self._traits, self._integers = np.pad(self._traits, more), np.pad(self._integers, more)
        self._floats, self._top_p = np.pad(self._floats, more), np.pad(self._top_p, more)

    def write(self, slot: int, params: SamplingParams) -> None:
        """Let a sequence with these parameters have a slot."""
        self._last = None
        self._traits[:, slot] = _traits(params)
        self._integers[:, slot] = (_as_int64(params.seed), params.top_k, params.logprobs or 0)
        self._floats[:, slot] = (max(params.temperature, _MIN_TEMPERATURE), params.min_p)
        self._top_p[0, slot] = params.top_p

    def columns(
        self, sequences: Rows[Sequence], slots: Integers, positions: Integers
    ) -> SamplingColumns:
        """Return the columns of the sequences in `slots`; `positions[row]` is the index that the
        row's new token gets."""
        layout = self._last
        if layout is None or not (layout.slots is slots or np.array_equal(layout.slots, slots)):
            self._last = layout = self._lay_out(slots)
        at = positions if layout.columns.random_rows is None else positions[layout.random]
        columns = replace(layout.columns, positions=upload(at, self._device))
        if layout.edited:
            columns = replace(columns, edits=self._edits(layout.edited, sequences, positions))
        if layout.penalised:
            columns = replace(columns, penalties=self._penalties(layout.penalised, sequences))
        return columns

    def asking_prompt_logprobs(self, slots: Integers) -> list[int]:
        """Return the places of the sequences that ask for log-probabilities of their prompt."""
        asks: list[int] = np.flatnonzero(self._traits[_ASKS_PROMPT, slots]).tolist()
        return asks

    def _lay_out(self, slots: Integers) -> _Layout:
        traits = self._traits.take(slots, axis=1)
        random, asking = np.flatnonzero(traits[_RANDOM]), np.flatnonzero(traits[_ASKS])
        edited, penalised = np.flatnonzero(traits[_EDITS]), np.flatnonzero(traits[_PENALISES])
        of_random = slots[random]
        seeds, top_k = upload(self._integers[:2].take(of_random, axis=1), self._device)
        temperatures, min_p = upload(self._floats.take(of_random, axis=1), self._device)
        truncation: tuple[Tensor, Tensor, Tensor] | None = None
        if traits[_TRUNCATES].take(random).any():
            (top_p,) = upload(self._top_p.take(of_random, axis=1), self._device)
            truncation = (top_k, top_p, min_p)
        columns = SamplingColumns(
            random_rows=self._unless_all(random, slots),
            temperatures=temperatures,
            seeds=seeds,
            positions=seeds,  # of no iteration yet
            truncation=truncation,
            asking=tuple(asking.tolist()),
            num_logprobs=tuple(self._integers[2, slots[asking]].tolist()),
            asking_rows=self._unless_all(asking, slots),
        )
        return _Layout(slots, columns, random, edited.tolist(), penalised.tolist())

    def _unless_all(self, rows: Integers, slots: Integers) -> Tensor | None:
        return None if len(rows) == len(slots) else upload(rows, self._device)

    def _edits(
        self, edited: Rows[int], sequences: Rows[Sequence], positions: Integers
    ) -> Edits | None:
        """Biases, and -inf for tokens that may not end a sequence yet.

        While a sequence is shorter than min_tokens, every id that could stop it is forbidden: the
        model's end-of-sequence ids, with ignore_eos too, and its own stop_token_ids.
        """
        edits: list[tuple[int, int, float]] = []
        for row in edited:
            request = sequences[row].request
            sampling = request.sampling
            edits.extend((row, token_id, bias) for token_id, bias in sampling.logit_bias.items())
            if positions[row] - request.prompt_len < sampling.min_tokens:
                forbidden = {*self._eos_token_ids, *sampling.stop_token_ids}
                edits.extend((row, token_id, float("-inf")) for token_id in forbidden)
        if not edits:
            return None
        rows, token_ids, amounts = zip(*edits, strict=True)
        cells = upload(np.array((rows, token_ids), dtype=np.int64), self._device)
        return Edits(cells[0], cells[1], upload(np.array(amounts, np.float32), self._device))

    def _penalties(self, penalised: Rows[int], sequences: Rows[Sequence]) -> Penalties:
        those = [sequences[row] for row in penalised]
        token_ids, output_counts = self._token_counts.batch(those, self._device)
        params = (seq.request.sampling for seq in those)
        factors = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        return Penalties(
            upload(np.array(penalised, dtype=np.int64), self._device),
            token_ids,
            output_counts,
            upload(np.array(factors, dtype=np.float32), self._device),
        )


def _traits(params: SamplingParams) -> tuple[bool, ...]:
    return (
        not params.greedy,
        params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0,
        bool(params.logit_bias or params.min_tokens),
        params.penalises,
        params.logprobs is not None,
        params.prompt_logprobs is not None,
    )


def _as_int64(seed: int) -> int:
    """The two's complement of an unsigned 64-bit seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
