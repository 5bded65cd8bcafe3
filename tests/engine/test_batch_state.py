"""Whoever joins, leaves, moves or loses its blocks: what a batch gets is what a fresh layout gives.

The state of one engine lives through every iteration; beside it, each iteration is laid out by a
builder that has never seen another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import ScheduledChunk, Sequence
from tandem.engine.batch_state import BatchState
from tandem.engine.inputs import InputBuilder, IterationInputs
from tandem.engine.launched import Launched
from tandem.engine.slots import Slots

CPU = torch.device("cpu")
EOS = (5, 6)
BLOCK = 4
PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 3},
    {"top_p": 0.5, "min_p": 0.25},
    {"temperature": 0, "repetition_penalty": 1.7, "logprobs": 2},
    {"presence_penalty": 1, "logit_bias": {4: 3.0}},
    {"min_tokens": 4, "stop_token_ids": (9,)},
    {"logprobs": 0, "prompt_logprobs": 1},
]


class Batch:
    """Sequences that compute, one iteration under way at most, on one long-lived builder."""

    def __init__(self) -> None:
        self.builder = make_builder()
        self.sequences: list[Sequence] = []
        self.previous: Launched | None = None
        self._names = iter(range(10**6))
        self._blocks = iter(range(1, 10**6))

    def join(self, prompt: int, params: dict[str, Any]) -> None:
        name = next(self._names)
        sampling = SamplingParams(**{"max_tokens": 99, "seed": 2**64 - 1 - name, **params})
        tokens = tuple(range(name, name + prompt))
        self.sequences.append(Sequence(Request(str(name), tokens, prompt, sampling), name))

    def settle(self, seq: Sequence) -> None:
        """The iteration that draws its token has ended."""
        if seq.num_in_flight:
            seq.token_ids.append(token_of(seq, seq.num_tokens))
            seq.num_in_flight = 0

    def preempt(self, seq: Sequence) -> None:
        self.settle(seq)
        seq.block_table, seq.num_computed = [], 0

    def plan(self, places: Rows[int], length: int) -> list[ScheduledChunk]:
        chunks = []
        for place in places:
            seq = self.sequences[place]
            if seq.request.sampling.penalises:
                self.settle(seq)
            count = min(length, seq.num_uncomputed)
            while len(seq.block_table) * BLOCK < seq.num_computed + count:
                seq.block_table.append(next(self._blocks))
            chunks.append(ScheduledChunk(seq, seq.num_computed, count))
        return chunks

    def compute(self, chunks: Rows[ScheduledChunk], inputs: IterationInputs) -> None:
        """Leave the draws in flight; those of the iteration before are known now."""
        for seq in self.previous.drawn if self.previous is not None else ():
            self.settle(seq)
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
            chunk.sequence.num_in_flight = int(chunk.samples)
        self.previous = Launched(inputs.drawn, inputs.slots)
        self.previous.token_ids = torch.tensor(
            [token_of(seq, seq.num_tokens) for seq in inputs.drawn], dtype=torch.int64
        )


def make_builder() -> InputBuilder:
    return InputBuilder(BatchState(EOS, CPU), BLOCK, CPU)


def token_of(seq: Sequence, position: int) -> int:
    """What any iteration would draw for a sequence at this position."""
    return 1000 * (seq.arrival + 1) + position


def laid_out_afresh(chunks: Rows[ScheduledChunk]) -> IterationInputs:
    """The same iteration with every token known, by a builder without a past."""
    known = []
    for seq, start, length, *_ in chunks:
        twin = Sequence(seq.request, seq.arrival, token_ids=list(seq.token_ids))
        twin.block_table = list(seq.block_table)
        if seq.num_in_flight:
            twin.token_ids.append(token_of(seq, len(seq.token_ids)))
        known.append(ScheduledChunk(twin, start, length))
    return make_builder().build(known, None)


def assert_same(got: IterationInputs, fresh: IterationInputs, previous: Launched | None) -> None:
    assert torch.equal(got.token_ids_after(previous), fresh.token_ids_after(None))
    assert [seq.arrival for seq in got.drawn] == [seq.arrival for seq in fresh.drawn]
    assert got.only_decodes == fresh.only_decodes
    for name in ("query_starts", "context_lens", "positions", "slots"):
        assert same(getattr(got.batch, name), getattr(fresh.batch, name)), name
    assert same(got.wanted_rows, fresh.wanted_rows)
    assert [entry.rows for entry in got.prompt_rows] == [entry.rows for entry in fresh.prompt_rows]
    assert (got.columns is None) == (fresh.columns is None)
    if got.columns is not None:
        for name, value in vars(fresh.columns).items():
            assert same(getattr(got.columns, name), value), name


def same(got: object, expected: object) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(got, Tensor) and got.dtype == expected.dtype and got.equal(expected)
    if isinstance(expected, tuple):
        return isinstance(got, tuple) and all(map(same, got, expected))
    return got == expected


def assert_tables(got: IterationInputs, chunks: Rows[ScheduledChunk]) -> None:
    for row, chunk in zip(got.batch.block_tables.tolist(), chunks, strict=True):
        table = chunk.sequence.block_table
        needed = -(-chunk.end // BLOCK)
        assert row[:needed] == table[:needed]
        assert set(row) <= set(table), "a blank is somebody else's block"


def disturb(batch: Batch, rng: random.Random) -> None:
    """Now and then somebody joins, leaves, loses its blocks, or all change places."""
    for seq in list(batch.sequences):
        if rng.random() < 0.04:
            batch.sequences.remove(seq)
        elif rng.random() < 0.04:
            batch.preempt(seq)
    if rng.random() < 0.2 or not batch.sequences:
        for _ in range(rng.randint(1, 8)):
            batch.join(rng.choice([1, 9, 30, 200]), rng.choice(PARAMS))
    if rng.random() < 0.1:
        rng.shuffle(batch.sequences)
    if rng.random() < 0.1:  # in the same place
        place = rng.randrange(len(batch.sequences))
        batch.join(1, rng.choice(PARAMS))
        batch.sequences[place] = batch.sequences.pop()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_a_batch_that_lived_through_anything_is_as_one_laid_out_afresh(seed: int) -> None:
    rng = random.Random(seed)
    batch = Batch()
    for _ in range(80):
        disturb(batch, rng)
        everybody = range(len(batch.sequences))
        part = rng.sample(everybody, rng.randint(1, len(everybody)))
        chunks = batch.plan(everybody if rng.random() < 0.8 else part, rng.choice([1, 20, 400]))
        inputs = batch.builder.build(chunks, batch.previous)
        assert_tables(inputs, chunks)
        assert_same(inputs, laid_out_afresh(chunks), batch.previous)
        batch.compute(chunks, inputs)


def test_whoever_comes_into_a_slot_brings_its_own_parameters() -> None:
    batch = Batch()
    for index in range(500):
        batch.sequences.clear()
        batch.join(1, PARAMS[index % len(PARAMS)])
        chunks = batch.plan([0], 1)
        assert_same(batch.builder.build(chunks, None), laid_out_afresh(chunks), None)


def test_a_table_that_is_too_short_is_refused() -> None:
    batch = Batch()
    batch.join(9, {})
    chunks = batch.plan([0], 9)
    batch.sequences[0].block_table.pop()
    with pytest.raises(ValueError, match="a block table of 2 blocks does not cover 3"):
        batch.builder.build(chunks, None)


def test_a_token_that_nobody_draws_is_not_awaited() -> None:
    batch = Batch()
    batch.join(3, {})
    batch.compute(chunks := batch.plan([0], 3), batch.builder.build(chunks, None))
    with pytest.raises(ValueError, match="awaited"):
        batch.builder.build(batch.plan([0], 1), Launched())


def test_slots_are_taken_back_from_those_that_left() -> None:
    """A state that serves for ever stays as large as its largest batch needs."""
    slots = Slots()
    kept = [[0]]
    for _ in range(1000):
        slots.of([kept[0], [1], [2], [3]])
    assert len(slots) <= 64
