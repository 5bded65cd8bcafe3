"""Two sequences never take turns in evicting each other, and preemption ends: over random arrivals
that do not fit into the pool together."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterations import BLOCK, Bench, make_bench
from tandem.core.sequence import IterationPlan, Sequence
from tandem.scheduler.draft import Draft
from tandem.scheduler.policies import POLICIES
from tandem.scheduler.preemption import Way


class Moment(NamedTuple):
    """What there was when something happened: enough to see what was won by the next time."""

    lengths: dict[Sequence, int]
    num_first_admissions: int
    num_preempted: dict[Sequence, int]

    def most_grown(self) -> int:
        """Tokens that one sequence has drawn since, at most."""
        return max(len(seq.token_ids) - length for seq, length in self.lengths.items())


class Watch:
    """Sees who gives way to whom, and checks at every eviction what it may be the second of."""

    def __init__(self, bench: Bench) -> None:
        scheduler = self.scheduler = bench.scheduler
        self.sequences = bench.sequences
        self.num_first_admissions = 0
        self.num_preempted: dict[Sequence, int] = {}
        self.resumed: dict[Sequence, Moment] = {}
        self.evicted: dict[tuple[Sequence, Sequence], Moment] = {}
        self.asks: Sequence | None = None
        room, schedule = scheduler._out_of_blocks, scheduler.schedule
        make_room, preempt = room._make_room, room._preempt

        def watched_make_room(seq: Sequence, missing: int, draft: Draft) -> bool:
            self.asks = seq
            return make_room(seq, missing, draft)

        def watched_preempt(victim: Sequence, way: Way, draft: Draft) -> None:
            if victim not in draft.admitted:  # else it has not begun: it stays in the queue
                self.evicts(victim)
            preempt(victim, way, draft)

        def watched_schedule(now: float = 0.0) -> IterationPlan:
            before = self.moment()
            plan = schedule(now)
            for seq in plan.admitted:
                if seq in self.num_preempted:
                    self.resumed[seq] = before
                else:
                    self.num_first_admissions += 1
            return plan

        room._make_room = watched_make_room  # type: ignore[method-assign]
        room._preempt = watched_preempt  # type: ignore[method-assign]
        scheduler.schedule = watched_schedule  # type: ignore[method-assign]

    def moment(self) -> Moment:
        lengths = {seq: len(seq.token_ids) for seq in self.sequences}
        return Moment(lengths, self.num_first_admissions, dict(self.num_preempted))

    def evicts(self, victim: Sequence) -> None:
        asks = self.asks
        assert asks is not None
        precedence = self.scheduler.policy.precedence
        assert asks is victim or precedence(asks) < precedence(victim)
        assert (victim, asks) not in self.evicted or asks is victim, "they take turns"
        if victim in self.resumed:
            since = self.resumed.pop(victim)
            is_joined = self.num_first_admissions > since.num_first_admissions
            assert is_joined or since.most_grown() >= BLOCK, "nobody has filled a block"
        if (before := self.evicted.get((asks, victim))) is not None:
            kept = self.num_preempted.get(asks, 0) == before.num_preempted.get(asks, 0)
            grown = len(asks.token_ids) - before.lengths[asks]
            assert asks is victim or not kept or grown >= BLOCK, "for one block, twice"
        self.evicted[asks, victim] = self.moment()
        self.num_preempted[victim] = self.num_preempted.get(victim, 0) + 1


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),  # iterations since the one before
        st.integers(1, 30),  # prompt tokens
        st.integers(1, 40),  # output tokens
        st.sampled_from([0, 0, 10]),  # priority
    ),
    min_size=2,
    max_size=10,
)


def run(bench: Bench, arrivals: list[tuple[int, int, int, int]]) -> None:
    for number, (gap, prompt, output, priority) in enumerate(arrivals):
        bench.steps(gap)
        bench.add(f"r{number}", prompt, output, priority=priority)
    bench.finish(limit=5000)


@pytest.mark.parametrize("policy", POLICIES)
@given(
    arrivals=ARRIVALS,
    spare_blocks=st.integers(0, 8),
    mode=st.sampled_from(["refill", "wait", "auto"]),
)
@settings(max_examples=60)
def test_nobody_takes_turns_and_every_resumption_is_paid_for(
    policy: str, arrivals: list[tuple[int, int, int, int]], spare_blocks: int, mode: str
) -> None:
    longest = max(prompt + output for _, prompt, output, _ in arrivals)
    bench = make_bench(policy, -(-longest // BLOCK) + 1 + spare_blocks, preemption=mode)
    watch = Watch(bench)
    run(bench, arrivals)
    drawn = sum(output for _, _, output, _ in arrivals)
    for count in watch.num_preempted.values():
        assert count <= 1 + len(arrivals) + drawn // BLOCK


def test_the_watch_sees_preemption_at_all() -> None:
    """Eight that outgrow a pool for three of them: else the property would say nothing."""
    bench = make_bench("chunked_prefill", 30, preemption="refill")
    watch = Watch(bench)
    run(bench, [(1, 5, 35, 0)] * 8)
    assert sum(watch.num_preempted.values()) >= 4
    assert max(watch.num_preempted.values()) >= 2, "one is preempted, comes back and goes again"
