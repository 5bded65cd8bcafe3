"""Drives an engine over plain block tables: no scheduler, no block pool, no prefix cache."""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from pathlib import Path

from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.request import PositionLogprobs, Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.core.stopping import finish_reason
from tandem.engine import Engine


def make_engine(
    model_dir: Path, *, block_size: int = 4, num_blocks: int = 256, dtype: str = "auto"
) -> Engine:
    model = ModelConfig(path=str(model_dir), dtype=dtype)  # type: ignore[arg-type]
    cache = CacheConfig(block_size=block_size, num_blocks=num_blocks)
    return Engine(model_dir, model, cache, "cpu")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def request(
    name: str,
    prompt: Rows[int],
    sampling: SamplingParams,
    emitted: Rows[int] = (),
) -> Request:
    """A request; one that is resumed brings the tokens that were emitted before."""
    return Request(name, (*prompt, *emitted), len(prompt), sampling)


class Driver:
    """Each iteration computes at most `chunk_size` tokens of every sequence that has joined."""

    def __init__(self, engine: Engine, chunk_size: int) -> None:
        self.engine = engine
        self.chunk_size = chunk_size
        self.free = list(range(engine.num_blocks))
        random.Random(0).shuffle(self.free)
        self.prompt_logprobs: dict[str, list[PositionLogprobs]] = {}
        self.logprobs: dict[str, list[PositionLogprobs | None]] = {}

    def run(self, requests: Rows[Request], stagger: int = 0) -> dict[str, list[int]]:
        """Return the output tokens by request; request i joins at iteration i * stagger."""
        sequences = [Sequence(request, arrival) for arrival, request in enumerate(requests)]
        iteration = 0
        while any(seq.phase != "finished" for seq in sequences):
            joined = [seq for seq in sequences if seq.arrival * stagger <= iteration]
            self.step([seq for seq in joined if seq.phase != "finished"])
            iteration += 1
        return {
            seq.request.request_id: seq.token_ids[seq.request.prompt_len :] for seq in sequences
        }

    def step(self, sequences: Rows[Sequence]) -> None:
        chunks = [
            ScheduledChunk(seq, seq.num_computed, min(self.chunk_size, seq.num_uncomputed))
            for seq in sequences
        ]
        for chunk in chunks:
            while len(chunk.sequence.block_table) * self.engine.storage.block_size < chunk.end:
                chunk.sequence.block_table.append(self.free.pop())
        output = self.engine.run(IterationPlan(tuple(chunks)))
        assert set(output.tokens) == {chunk.sequence for chunk in chunks if chunk.samples}
        for seq, positions in output.prompt_logprobs.items():
            self.prompt_logprobs.setdefault(seq.request.request_id, []).extend(positions)
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        for seq, token in output.tokens.items():
            seq.token_ids.append(token.token_id)
            self.logprobs.setdefault(seq.request.request_id, []).append(token.logprobs)
            self._finish_if_done(seq)

    def _finish_if_done(self, seq: Sequence) -> None:
        spec = self.engine.spec
        seq.finish_reason = finish_reason(seq, spec.eos_token_ids, spec.max_model_len)
        if seq.finish_reason is not None:
            seq.phase = "finished"
            self.free.extend(seq.block_table)
            seq.block_table = []
