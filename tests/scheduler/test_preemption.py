"""Which way out of a full pool is taken, and what each of them keeps its promise about."""

from __future__ import annotations

import pytest

from tandem.core.config import SchedulerConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.host_tier import HostTier
from tandem.scheduler import Scheduler
from tandem.scheduler.costs import CostEstimator, Work, work_of
from tandem.scheduler.preemption import Options, Preemption, Way

BLOCK = 4


def preemption(mode: str = "auto", block_bytes: int = 4_000_000) -> Preemption:
    return Preemption(SchedulerConfig(preemption=mode), CostEstimator(), block_bytes)


@pytest.mark.parametrize(
    ("mode", "options", "way"),
    [
        ("auto", Options(wait=3, swap=2, refill=1), "refill"),
        ("auto", Options(wait=3, swap=1, refill=2), "swap"),
        ("auto", Options(wait=1, swap=2, refill=3), "wait"),
        ("auto", Options(wait=None, swap=None, refill=9), "refill"),
        ("refill", Options(wait=0, swap=0, refill=9), "refill"),
        ("swap", Options(wait=0, swap=9, refill=0), "swap"),
        ("swap", Options(wait=0, swap=None, refill=9), "refill"),
        ("wait", Options(wait=9, swap=0, refill=0), "wait"),
        ("wait", Options(wait=None, swap=1, refill=2), "swap"),
    ],
)
def test_the_cheapest_way_is_taken_or_the_one_that_is_configured(
    mode: str, options: Options, way: Way
) -> None:
    assert preemption(mode).choose(options) == way


def test_copies_are_believed_to_take_what_they_took() -> None:
    believed = preemption(block_bytes=4_000_000)
    assert believed.swap_seconds(10) == pytest.approx(2 * 10 * 0.001)
    for _ in range(50):
        believed.copied(10, 0.1, to_host=True)
        believed.copied(10, 0.2, to_host=False)
    assert believed.swap_seconds(10) == pytest.approx(0.3, rel=0.01)


def test_a_refill_costs_what_prefill_workers_needed_or_else_what_prompts_cost_here() -> None:
    costs = CostEstimator()
    believed = Preemption(SchedulerConfig(), costs, 1)
    assert believed.refill_seconds(1000) == 0
    for tokens in (10, 20, 30, 40) * 3:
        costs.measured(Work(prompt_tokens=tokens), 0.001 * tokens)
        believed.measured_run(Work(prompt_tokens=tokens), (0.001 * tokens,))
    assert believed.refill_seconds(100) == pytest.approx(0.1, rel=0.05)
    believed.prefilled(100, 0.5)
    assert believed.refill_seconds(100) == pytest.approx(0.5)


def test_a_wait_is_shorter_where_sequences_end_before_their_bound() -> None:
    believed = preemption()
    believed.measured_run(Work(decodes=1), (0.01,))
    assert believed.wait_seconds(100) == pytest.approx(1.0)
    for _ in range(50):
        believed.ended(25, 100)
    assert believed.wait_seconds(100) == pytest.approx(0.25, rel=0.01)


class Bench:
    """A scheduler with a host tier, one token per iteration and sequence."""

    def __init__(self, mode: str, num_blocks: int, in_host: int = 64) -> None:
        self.pool = BlockPool(num_blocks, BLOCK, prefix_cache=False)
        self.tier = HostTier(self.pool, in_host, spills=False)
        config = SchedulerConfig(preemption=mode)
        self.scheduler = Scheduler(config, self.pool, 100, host_tier=self.tier, block_bytes=1)
        self.sequences: list[Sequence] = []

    def add(self, prompt: int, output: int) -> Sequence:
        number = len(self.sequences)
        tokens = tuple(range(100 * number, 100 * number + prompt))
        request = Request(f"r{number}", tokens, prompt, SamplingParams(max_tokens=output))
        seq = Sequence(request, number)
        self.scheduler.add(seq)
        self.sequences.append(seq)
        return seq

    def step(self, *, copies: bool = True) -> None:
        plan = self.scheduler.schedule()
        self.scheduler.measured(work_of(plan.chunks), 0.01)
        self.scheduler.advance(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                self.scheduler.append(chunk.sequence, 7)
                if chunk.sequence.num_tokens >= chunk.sequence.request.max_len:
                    self.scheduler.finish(chunk.sequence, "length")
        for seq in plan.preempted:
            self.scheduler.add(seq)
        for copy in self.scheduler.take_copies() if copies else ():
            restored = self.scheduler.copied(copy, 0.001)
            if restored is not None:
                self.scheduler.fall_back(restored)

    def run(self) -> None:
        for _ in range(300):
            if all(seq.phase == "finished" for seq in self.sequences):
                return
            self.step()
        raise AssertionError([seq.phase for seq in self.sequences])


def test_a_swapped_sequence_computes_nothing_twice() -> None:
    bench = Bench("swap", num_blocks=6)
    old, young = bench.add(7, 12), bench.add(7, 12)
    while not bench.scheduler.num_preempted["swap"]:
        bench.step()
    assert (young.phase, young.block_table) == ("waiting", [])
    kept = young.num_in_host
    assert kept == young.num_tokens - 1
    while young.phase != "running":
        bench.step()
    assert young.num_computed >= kept
    bench.run()
    assert [old.num_output_tokens, young.num_output_tokens] == [12, 12]
    assert (bench.pool.num_used, bench.tier.pool.num_used) == (0, 0)


def test_nobody_else_gives_way_while_blocks_are_on_their_way_to_the_host() -> None:
    bench = Bench("swap", num_blocks=9)
    for _ in range(3):
        bench.add(7, 12)
    while not bench.scheduler.num_preempted["swap"]:
        bench.step(copies=False)
    for _ in range(3):
        bench.step(copies=False)
    assert bench.scheduler.num_preempted["swap"] == 1
    assert bench.tier.num_under_way == 1


def test_one_waits_for_another_that_is_sure_to_end() -> None:
    bench = Bench("wait", num_blocks=6)
    first, short = bench.add(8, 12), bench.add(7, 6)
    bench.run()
    assert bench.scheduler.num_preempted == {"wait": 1}
    assert [first.num_output_tokens, short.num_output_tokens] == [12, 6]


def test_nobody_waits_where_nobody_is_sure_to_end() -> None:
    bench = Bench("wait", num_blocks=6)
    bench.add(7, 14)
    bench.add(7, 14)
    bench.run()
    assert bench.scheduler.num_preempted["wait"] <= 1
    assert bench.scheduler.num_preempted["swap"] + bench.scheduler.num_preempted["refill"] >= 1


def test_without_room_in_host_memory_a_victim_is_refilled() -> None:
    bench = Bench("swap", num_blocks=6, in_host=1)
    bench.add(7, 12)
    bench.add(7, 12)
    bench.run()
    assert set(bench.scheduler.num_preempted) == {"refill"}


def test_a_copy_that_failed_costs_a_refill_and_no_token() -> None:
    bench = Bench("swap", num_blocks=6)
    bench.add(7, 12)
    young = bench.add(7, 12)
    while not bench.scheduler.num_preempted["swap"]:
        bench.step(copies=False)
    (copy,) = bench.scheduler.take_copies()
    assert bench.scheduler.copied(copy, 0.0, succeeded=False) is None
    assert young.host_blocks == []
    bench.run()
    assert young.num_output_tokens == 12
    assert (bench.pool.num_used, bench.tier.pool.num_used) == (0, 0)
