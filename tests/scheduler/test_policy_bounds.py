"""Nobody starves: each policy's own bound, over random arrivals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterations import Bench, make_bench
from tandem.core.sequence import IterationPlan, Sequence
from tandem.scheduler.policies import POLICIES

Rule = Callable[[list[Sequence], IterationPlan, float], None]
"""Checks one plan, given who waited before it was made (in order) and when."""

AGEING, BOUND, STREAK = 3.0, 6.0, 2
SETTINGS: dict[str, object] = {
    "batch_size": 3,
    "batch_wait": 2,
    "decode_streak": STREAK,
    "ageing": AGEING,
    "waiting_bound": BOUND,
    "ttft_objective": 4,
    "max_running": 4,
}
PRIORITIES = (-10, 0, 10)


def overtakes(waiting: list[Sequence], plan: IterationPlan) -> list[tuple[Sequence, Sequence]]:
    """Pairs (first, second): `first` was admitted while `second` went on waiting."""
    left = [seq for seq in waiting if seq not in plan.admitted]
    return [(first, second) for first in plan.admitted for second in left]


def in_order(waiting: list[Sequence], plan: IterationPlan, now: float) -> None:
    """Admission follows priority and arrival."""
    assert all(first.order < second.order for first, second in overtakes(waiting, plan))


def group_by_group(waiting: list[Sequence], plan: IterationPlan, now: float) -> None:
    """Nobody who came when a group was formed already gets in before its members."""
    for first, second in overtakes(waiting, plan):
        assert first.order < second.order or first.arrived_at <= second.arrived_at


def aged(waiting: list[Sequence], plan: IterationPlan, now: float) -> None:
    """A better class overtakes those who came up to AGEING seconds per class before."""
    for first, second in overtakes(waiting, plan):
        classes = (second.request.priority - first.request.priority) // 10
        assert first.arrived_at - second.arrived_at <= AGEING * classes


def bounded(waiting: list[Sequence], plan: IterationPlan, now: float) -> None:
    """Nobody overtakes one that has waited BOUND seconds, except those who came before it."""
    for first, second in overtakes(waiting, plan):
        if now - second.arrived_at >= BOUND:
            assert first.arrived_at <= second.arrived_at


def behind_a_cut_prompt(waiting: list[Sequence], plan: IterationPlan, now: float) -> None:
    """The first in the queue is passed by only while an earlier prompt is still being computed."""
    for first, second in overtakes(waiting, plan):
        if second is waiting[0] and first.order > second.order:
            assert plan.chunks[0].sequence not in waiting
            assert any(c.length > 1 and c.sequence not in waiting for c in plan.chunks)


def tenants_in_order(waiting: list[Sequence], plan: IterationPlan, now: float) -> None:
    """Within a tenant, admission follows priority and arrival."""
    for first, second in overtakes(waiting, plan):
        if first.request.tenant == second.request.tenant:
            assert first.order < second.order


RULES: dict[str, Rule] = {
    **dict.fromkeys(POLICIES, in_order),
    "static_batching": group_by_group,
    "priority_classes": aged,
    "deadline": bounded,
    "shortest_prompt": bounded,
    "concatenation": behind_a_cut_prompt,
    "fair_share": tenants_in_order,
}
REQUESTS = st.tuples(
    st.integers(0, 3),  # seconds after the one before
    st.integers(1, 40),  # prompt
    st.integers(1, 12),  # output
    st.sampled_from(PRIORITIES),
    st.sampled_from(["x", "y", "z"]),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=20))
@settings(max_examples=30)
def test_nobody_is_overtaken_beyond_the_bound(
    policy: str, requests: list[tuple[int, int, int, int, str]]
) -> None:
    bench = make_bench(policy, **SETTINGS)
    schedule = bench.scheduler.schedule

    def checked(now: float) -> IterationPlan:
        waiting = list(bench.scheduler.waiting)
        plan = schedule(now)
        RULES[policy](waiting, plan, now)
        return plan

    bench.scheduler.schedule = checked  # type: ignore[method-assign]
    for number, (pause, prompt, output, priority, tenant) in enumerate(requests):
        bench.steps(pause)
        bench.add(f"r{number}-", prompt, output, priority=priority, tenant=tenant)
    bench.finish()
    assert all(seq.phase == "finished" for seq in bench.sequences)


@given(requests=st.lists(REQUESTS, min_size=2, max_size=20))
def test_decode_first_moves_prompts_on_once_per_streak(
    requests: list[tuple[int, int, int, int, str]],
) -> None:
    bench = make_bench("decode_first", **SETTINGS)
    for number, (_, prompt, output, _, _) in enumerate(requests):
        bench.add(f"r{number}-", prompt + 1, output)
    pure = 0
    while bench.scheduler.num_waiting or bench.scheduler.num_running:
        places = bench.scheduler.num_running < bench.scheduler.config.max_running
        prompts = any(seq.num_uncomputed > 1 for seq in bench.scheduler.running)
        wanted = prompts or (places and bench.scheduler.num_waiting > 0)
        carries = any(not part.endswith("-1") for part in bench.step().split())
        pure = 0 if carries or not wanted else pure + 1
        assert pure <= STREAK


@pytest.mark.parametrize("policy", ["iteration_level", "chunked_prefill", "auto_chunk", "deadline"])
def test_a_running_sequence_gets_a_token_in_every_iteration(policy: str) -> None:
    bench = make_bench(policy, **SETTINGS)
    seq = bench.add("a", 3, output=40)
    bench.step()
    for number in range(10):
        bench.add(f"r{number}-", 30, output=2)
    for before, after in pairwise(count_outputs(bench, seq, 30)):
        assert after == before + 1


def count_outputs(bench: Bench, seq: Sequence, steps: int) -> list[int]:
    counts = []
    for _ in range(steps):
        bench.step()
        counts.append(seq.num_output_tokens)
    return counts


@given(
    prompts=st.lists(st.integers(1, 30), min_size=60, max_size=60),
    outputs=st.lists(st.integers(1, 12), min_size=60, max_size=60),
    weight=st.sampled_from([1.0, 2.0, 4.0]),
)
@settings(max_examples=20)
def test_fair_share_keeps_two_waiting_tenants_within_the_bound(
    prompts: list[int], outputs: list[int], weight: float
) -> None:
    """One floods with everything at once, the other has a request waiting at any time."""
    bench = make_bench("fair_share", tenant_weights=f"flood={weight}", **SETTINGS)
    policy = bench.scheduler.policy
    quiet = 0
    for number in range(30):
        bench.add("flood", prompts[number], outputs[number], tenant="flood")
    while True:
        waiting = [seq.request.tenant for seq in bench.scheduler.waiting]
        if waiting.count("quiet") == 0:
            if quiet == 30:
                return
            bench.add("quiet", prompts[30 + quiet], outputs[30 + quiet], tenant="quiet")
            quiet += 1
        if waiting.count("flood") == 0:
            return
        difference = policy.service("flood") - policy.service("quiet")  # type: ignore[attr-defined]
        assert abs(difference) <= 2 * max(30, 2 * 12 * 4)
        bench.step()
