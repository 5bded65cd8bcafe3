"""Leaping over equal decode steps changes nothing but the time that a simulation takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.scheduler import Scheduler, make_policy
from tandem.scheduler.policies import POLICIES
from tandem.scheduler.steady import repeat, steady_steps
from tandem.simulator import ClusterSpec, Report, TraceRequest, simulate

MakeSpec = Callable[..., ClusterSpec]
REQUESTS = st.builds(
    TraceRequest,
    arrival=st.floats(0, 3),
    prompt_len=st.integers(1, 40),
    output_len=st.integers(1, 60),
    hash_ids=st.just(()),
)


def counts(report: Report) -> dict[str, Any]:
    """What both ways must agree on exactly."""
    return {
        "tokens": report.output_tokens,
        "preemptions": report.num_preemptions,
        "iterations": {role: use.iterations for role, use in report.pools.items()},
        "computed": {role: use.tokens for role, use in report.pools.items()},
        "gaps": report.gaps.num_added,
        "lent": (report.lent_tokens, report.kept_tokens),
    }


def times(report: Report) -> list[float]:
    """Every latency, and the end."""
    ordered = (report.ttfts, report.tpots, report.longest_gaps)
    return [value for values in ordered for value in sorted(values)] + [report.seconds]


PROMPTS_TO_LEND = st.builds(
    TraceRequest,
    # Which of two things at the very same moment is first is anybody's guess: so no two requests
    # come together, nor one with a heartbeat.
    arrival=st.integers(0, 2000).map(lambda number: 2.500013 + 0.00101 * number),
    prompt_len=st.integers(1, 250),
    output_len=st.integers(1, 90),
    hash_ids=st.just(()),
)
WARM_UP = [TraceRequest(0.2 * i, 40, 3) for i in range(12)]
"""Enough for workers to know what their iterations cost."""


@pytest.mark.parametrize("policy", POLICIES)
@given(
    requests=st.lists(PROMPTS_TO_LEND, min_size=8, max_size=30, unique_by=lambda r: r.arrival),
    pools=st.sampled_from([(1, 1), (1, 2), (2, 2)]),
    jitter=st.sampled_from([(), (-0.003, 0.0, 0.001, 0.007)]),
    num_blocks=st.integers(90, 300),
    preemption=st.sampled_from(["refill", "auto"]),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_leaps_change_no_decision_of_lending(
    policy: str,
    requests: list[TraceRequest],
    pools: tuple[int, int],
    jitter: tuple[float, ...],
    num_blocks: int,
    preemption: str,
    make_spec: MakeSpec,
) -> None:
    """Workers learn from every iteration, and prompts move by what they have learnt."""
    limits = {"max_batch_tokens": 64, "itl_objective": 0.041, "preemption": preemption}
    spec = make_spec(*pools, num_blocks=num_blocks, policy=policy, **limits)
    cost = spec.profile.iteration.model_copy(update={"jitter": jitter, "context": 1e-5})
    changed = {"iteration": cost, "rpc_seconds": 0.00113}
    spec = replace(spec, profile=spec.profile.model_copy(update=changed))
    assert spec.config.lending.mode == "measured"
    trace = [*WARM_UP, *sorted(requests, key=lambda request: request.arrival)]
    stepped, leapt = simulate(trace, replace(spec, leaps=False)), simulate(trace, spec)
    assert counts(leapt) == counts(stepped)
    assert times(leapt) == times(stepped)


def test_that_is_said_of_runs_in_which_prompts_are_lent_and_requests_kept(
    make_spec: MakeSpec,
) -> None:
    rng = Random(3)
    requests = [
        TraceRequest(2.5 + 2 * rng.random(), rng.randrange(100, 250), rng.randrange(20, 90))
        for _ in range(25)
    ]
    spec = make_spec(1, 1, num_blocks=110, max_batch_tokens=64, itl_objective=0.041)
    trace = [*WARM_UP, *sorted(requests)]
    stepped, leapt = simulate(trace, replace(spec, leaps=False)), simulate(trace, spec)
    assert stepped.lent_tokens > 200
    assert stepped.kept_tokens > 20
    assert counts(leapt) == counts(stepped)
    assert times(leapt) == times(stepped)


@pytest.mark.parametrize("policy", POLICIES)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=12),
    prefill=st.integers(0, 1),
    jitter=st.sampled_from([(), (-0.003, 0.0, 0.001, 0.007)]),
    spare=st.integers(0, 40),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_leap_ends_where_single_steps_end(
    policy: str,
    requests: list[TraceRequest],
    prefill: int,
    jitter: tuple[float, ...],
    spare: int,
    make_spec: MakeSpec,
) -> None:
    spec = make_spec(prefill, 2, num_blocks=26 + spare, policy=policy)
    cost = spec.profile.iteration.model_copy(update={"jitter": jitter, "context": 1e-5})
    spec = replace(spec, profile=spec.profile.model_copy(update={"iteration": cost}))
    requests.sort(key=lambda request: request.arrival)
    stepped, leapt = simulate(requests, replace(spec, leaps=False)), simulate(requests, spec)
    assert counts(leapt) == counts(stepped)
    assert times(leapt) == times(stepped)


def test_repeating_leaves_the_blocks_and_hashes_that_steps_leave() -> None:
    left = []
    for leap in (False, True):
        scheduler, plan, sequences = decoding_batch()
        steps = steady_steps(scheduler, plan, 9)
        assert steps == 9
        if leap:
            plan = repeat(scheduler, plan, steps, 7)
        else:
            for _ in range(steps):
                scheduler.advance(plan)
                for chunk in plan.chunks:
                    scheduler.append(chunk.sequence, 7)
                plan = scheduler.schedule()
        scheduler.pool.check_integrity()
        left.append(
            [
                (
                    s.token_ids,
                    s.num_computed,
                    len(s.block_table),
                    s.block_hashes[: s.num_computed // 4],
                )
                for s in sequences
            ]
            + [(chunk.start, chunk.length) for chunk in plan.chunks]
            + [scheduler.pool.num_used]
        )
    assert left[0] == left[1]


@pytest.mark.parametrize("policy", ["auto_chunk", "deadline", "fair_share", "decode_first"])
def test_policies_that_count_or_learn_are_asked_at_every_step(policy: str) -> None:
    scheduler, plan, _ = decoding_batch(policy)
    assert steady_steps(scheduler, plan, 9) == 0


def test_steps_end_before_a_sequence_does_and_before_blocks_run_out() -> None:
    scheduler, plan, _ = decoding_batch()
    assert steady_steps(scheduler, plan, 1000) == 40 - 2  # the last token is a real step's
    scheduler.pool.allocate(scheduler.pool.num_free - 1, "other")
    few = steady_steps(scheduler, plan, 1000)
    assert few < 8
    repeat(scheduler, plan, few, 0)
    scheduler.add(Sequence(Request("late", (1, 2), 2, SamplingParams(max_tokens=2)), 9))
    assert steady_steps(scheduler, plan, 1000) == 0, "somebody waits"


def decoding_batch(policy: str = "chunked_prefill") -> tuple[Scheduler, Any, list[Sequence]]:
    """Two sequences in their first decode step, of blocks of 4 tokens."""
    from tandem.core.config import SchedulerConfig

    config = SchedulerConfig(policy=policy)
    scheduler = Scheduler(config, BlockPool(64, 4), 1000, make_policy(config))
    sequences = []
    for number, length in enumerate((5, 10)):
        prompt = tuple(range(number * 100, number * 100 + length))
        request = Request(f"r{number}", prompt, length, SamplingParams(max_tokens=40))
        sequences.append(Sequence(request, number))
        scheduler.add(sequences[-1])
    plan = scheduler.schedule()
    scheduler.advance(plan)
    for chunk in plan.chunks:
        scheduler.append(chunk.sequence, 7)
    return scheduler, scheduler.schedule(), sequences
