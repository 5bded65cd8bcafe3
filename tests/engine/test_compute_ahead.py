"""Iterations launched one ahead draw the same tokens as one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.engine.conftest import TinyModel
from tests.engine.driver import make_engine

from tandem.core.config import SchedulerConfig
from tandem.core.request import Request, SampledToken
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.core.stopping import finish_reason
from tandem.engine import Engine, Launched
from tandem.kvcache.block_pool import BlockPool
from tandem.scheduler import Scheduler

PROMPTS = [[(31 * i * i + 7 * i + n) % 256 for i in range(n)] for n in (1, 7, 33, 18, 64)]
KINDS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 0.9, "top_p": 0.8, "min_tokens": 5},
    {"temperature": 1.0, "presence_penalty": 0.7},
    {"temperature": 0.0, "logit_bias": {9: 3.0}, "prompt_logprobs": 1},
]


def requests(penalties: bool) -> Iterator[Request]:
    for index, (prompt, kind) in enumerate(zip(PROMPTS, KINDS, strict=True)):
        if penalties or "presence_penalty" not in kind:
            sampling = SamplingParams(max_tokens=9 + index, seed=index, **kind)  # type: ignore[arg-type]
            yield Request(str(index), tuple(prompt), len(prompt), sampling)


class Ahead:
    """An engine, a scheduler, and up to `depth` iterations under way."""

    def __init__(self, engine: Engine, depth: int) -> None:
        pool = BlockPool(engine.num_blocks, 4)
        config = SchedulerConfig(max_batch_tokens=40, chunk_size=16)
        self.engine, self.depth = engine, depth
        self.scheduler = Scheduler(config, pool, engine.spec.max_model_len)
        self.under_way: list[tuple[IterationPlan, Launched]] = []
        self.drawn: dict[str, list[SampledToken]] = {}
        self.num_awaited = 0

    def run(self, arriving: list[Request]) -> dict[str, list[SampledToken]]:
        """One request arrives before each iteration."""
        arrivals = enumerate(arriving)
        while True:
            for index, request in arrivals:
                self.scheduler.add(Sequence(request, index))
                break
            plan = self.scheduler.schedule()
            if plan.chunks:
                self.under_way.append((plan, self.engine.launch(plan)))
                self.scheduler.launch(plan)
                self.num_awaited += sum(chunk.input_in_flight for chunk in plan.chunks)
            runs_on = plan.chunks and not self.scheduler.must_settle
            while len(self.under_way) > (self.depth if runs_on else 0):
                self.settle(*self.under_way.pop(0))
            if not plan.chunks and not self.scheduler.num_waiting:
                assert self.scheduler.pool.num_used == 0
                return self.drawn

    def settle(self, plan: IterationPlan, launched: Launched) -> None:
        output = launched.result()
        self.scheduler.advance(plan)
        for seq, token in output.tokens.items():
            if seq.phase == "running":
                self.drawn.setdefault(seq.request.request_id, []).append(token)
                self.scheduler.append(seq, token.token_id)
                spec = self.engine.spec
                reason = finish_reason(seq, spec.eos_token_ids, spec.max_model_len)
                if reason is not None:
                    self.scheduler.finish(seq, reason)


@pytest.mark.parametrize("penalties", [False, True])
def test_the_same_draws_one_ahead(tiny_model: TinyModel, kernels: str, penalties: bool) -> None:
    engine = make_engine(tiny_model("llama"))
    sent = list(requests(penalties))
    expected = Ahead(engine, depth=0).run(sent)
    engine.compute_ahead()
    ahead = Ahead(engine, depth=1)
    drawn = ahead.run(sent)
    assert {name: [token.token_id for token in tokens] for name, tokens in drawn.items()} == {
        name: [token.token_id for token in tokens] for name, tokens in expected.items()
    }
    if kernels == "C++":  # whose rows keep their every bit, whatever the batch
        assert drawn == expected
    assert ahead.num_awaited > 8, "nothing was computed ahead"


def test_a_failed_iteration_fails_the_one_that_awaits_its_draws(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("llama"))
    engine.compute_ahead()
    seq = Sequence(Request("r", (1, 2, 999_999), 3, SamplingParams(max_tokens=9)), 0)
    seq.block_table = [0, 1]
    first = engine.launch(IterationPlan((ScheduledChunk(seq, 0, 3),)))
    seq.num_computed, seq.num_in_flight = 3, 1
    second = engine.launch(IterationPlan((ScheduledChunk(seq, 3, 1),)))
    with pytest.raises(IndexError):
        first.result()
    with pytest.raises(RuntimeError, match="the iteration before"):
        second.result()
