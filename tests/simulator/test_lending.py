"""Slack that is lent, under the virtual clock: the decisions of the live workers, case by case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from tandem.simulator import ClusterSpec, Report, TraceRequest, simulate

MakeSpec = Callable[..., ClusterSpec]
WARM_UP = [TraceRequest(0.2 * i, 40, 2) for i in range(12)]
"""Enough, one after the other, for both workers to know what their iterations cost."""
SLO = {"ttft": 0.5, "itl": 0.05}


def run(spec: ClusterSpec, mode: str, trace: list[TraceRequest]) -> Report:
    lending = spec.config.lending.model_copy(update={"mode": mode})
    config = spec.config.model_copy(update={"lending": lending})
    changed = ClusterSpec(spec.profile, config, spec.num_prefill, spec.num_decode)
    return simulate(sorted([*WARM_UP, *trace]), changed, SLO)


def test_a_queue_of_prompts_is_shared_with_a_decode_worker_that_has_slack(
    make_spec: MakeSpec,
) -> None:
    spec = make_spec(1, 1, num_blocks=512, max_batch_tokens=64, itl_objective=0.04)
    trace = [TraceRequest(3.0, 200, 5) for _ in range(6)]
    alone, shared = (run(spec, mode, trace) for mode in ("threshold", "measured"))
    assert alone.lent_tokens == 0
    assert shared.lent_tokens > 200
    assert max(shared.ttfts) < 0.75 * max(alone.ttfts)


def test_running_sequences_stay_within_their_objective_while_prompts_are_lent(
    make_spec: MakeSpec,
) -> None:
    spec = make_spec(1, 1, num_blocks=512, max_batch_tokens=256, chunk_size=256, itl_objective=0.04)
    running = [TraceRequest(2.9, 20, 60), TraceRequest(2.95, 20, 60)]
    trace = [*running, *(TraceRequest(3.0, 200, 2) for _ in range(6))]
    report = run(spec, "measured", trace)
    assert report.lent_tokens > 0
    # Who joins waits for the iteration under way before its own: two of 40 ms at most.
    assert max(report.longest_gaps) < 0.085


def test_an_idle_prefill_worker_decodes_what_the_decode_worker_has_no_blocks_for(
    make_spec: MakeSpec,
) -> None:
    spec = make_spec(1, 1, num_blocks=32, max_batch_tokens=64)
    trace = [TraceRequest(3.0, 50, 30) for _ in range(6)]
    alone, shared = (run(spec, mode, trace) for mode in ("threshold", "measured"))
    assert alone.kept_tokens == 0
    assert shared.kept_tokens > 10
    assert shared.seconds < alone.seconds
    assert shared.output_tokens == sum(request.output_len for request in [*WARM_UP, *trace])


@pytest.mark.parametrize("num_blocks", [30, 512])
@pytest.mark.parametrize("seed", range(8))
def test_every_request_ends_with_every_token(
    seed: int, num_blocks: int, make_spec: MakeSpec
) -> None:
    rng = Random(seed)
    spec = make_spec(rng.randint(1, 2), rng.randint(1, 2), num_blocks, max_batch_tokens=64)
    trace = [
        TraceRequest(3 + rng.random(), rng.randint(1, 80), rng.randint(1, 25)) for _ in range(40)
    ]
    report = run(spec, "measured", trace)  # raises if a block is held to the end
    assert report.num_finished == len(trace) + len(WARM_UP)
    assert report.output_tokens == sum(request.output_len for request in [*WARM_UP, *trace])


@pytest.mark.parametrize("seed", range(8, 14))
def test_a_prompt_that_outgrew_its_blocks_is_not_handed_out(seed: int, make_spec: MakeSpec) -> None:
    """Messages that take longer than iterations let a kept request outgrow what was reserved."""
    rng, spec = Random(seed), make_spec(2, 2, num_blocks=40, max_batch_tokens=64)
    slow = replace(spec, profile=spec.profile.model_copy(update={"rpc_seconds": 0.02}))
    trace = [
        TraceRequest(3 + rng.random(), rng.randint(1, 70), rng.randint(1, 25)) for _ in range(40)
    ]
    report = run(slow, "measured", trace)
    assert report.kept_tokens > 0
    assert report.num_finished == len(trace) + len(WARM_UP)
