"""What the scheduler does with an iteration under way, one promise at a time."""

from __future__ import annotations

from iterations import BLOCK, Bench, describe, make_bench
from tandem.core.config import SchedulerConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.hashing import chain_hashes
from tandem.scheduler import Scheduler


def launched(bench: Bench) -> IterationPlan:
    plan = bench.scheduler.schedule(bench.now)
    bench.scheduler.launch(plan)
    return plan


def settle(bench: Bench, plan: IterationPlan, token_id: int = 7) -> None:
    bench.scheduler.advance(plan)
    for chunk in plan.chunks:
        if chunk.samples and chunk.sequence.phase == "running":
            bench.scheduler.append(chunk.sequence, token_id)
    bench.scheduler.pool.check_integrity()


def test_a_sequence_decodes_on_from_a_token_that_is_not_known_yet() -> None:
    bench = make_bench("chunked_prefill")
    seq = bench.add("a", prompt=5, output=9)
    first, second = launched(bench), launched(bench)
    assert (describe(first), describe(second)) == ("a5", "a1")
    assert not first.chunks[0].input_in_flight
    assert second.chunks[0].input_in_flight
    assert (second.chunks[0].start, seq.num_tokens) == (5, 5)
    settle(bench, first)
    assert (seq.num_tokens, seq.num_in_flight) == (6, 1)


def test_nothing_is_planned_past_the_last_token_that_a_request_wants() -> None:
    bench = make_bench("chunked_prefill")
    seq = bench.add("a", prompt=5, output=2)
    plans = [launched(bench) for _ in range(3)]
    assert [describe(plan) for plan in plans] == ["a5", "a1", ""]
    for plan in plans:
        settle(bench, plan)
    assert seq.num_output_tokens == 2


def test_a_sequence_that_ended_keeps_its_blocks_until_its_last_iteration_has_ended() -> None:
    bench = make_bench("chunked_prefill")
    seq = bench.add("a", prompt=5, output=9)
    first, second = launched(bench), launched(bench)
    settle(bench, first)
    bench.scheduler.finish(seq, "stop")
    assert bench.scheduler.num_running == 0
    assert bench.scheduler.pool.num_used == 2, "an iteration under way writes them"
    settle(bench, second)
    assert bench.scheduler.pool.num_used == 0
    assert seq.token_ids[5:] == [7], "the token of the discarded row reached the sequence"


def test_nothing_of_a_discarded_row_is_published() -> None:
    pool = BlockPool(64, BLOCK)
    scheduler = Scheduler(SchedulerConfig(), pool, max_model_len=900)
    prompt = tuple(range(BLOCK - 1))
    sampling = SamplingParams(max_tokens=99)
    seq = Sequence(Request("a", prompt, len(prompt), sampling), 0)
    scheduler.add(seq)
    plans = []
    for _ in range(2):
        plans.append(scheduler.schedule())
        scheduler.launch(plans[-1])
    scheduler.advance(plans[0])
    scheduler.append(seq, 7)
    scheduler.finish(seq, "stop")  # its second row fills the first block
    scheduler.advance(plans[1])
    assert pool.match_prefix(chain_hashes([*prompt, 7], BLOCK)) == []
    assert (pool.num_used, pool.num_cached) == (0, 0)


def test_a_penalty_needs_the_token_before_so_nothing_is_planned_ahead_of_it() -> None:
    bench = make_bench("chunked_prefill")
    bench.add("a", prompt=5, output=9)
    tokens = tuple(range(100, 103))
    sampling = SamplingParams(max_tokens=9, frequency_penalty=0.5)
    bench.scheduler.add(Sequence(Request("p", tokens, 3, sampling), 1))
    first = launched(bench)
    assert bench.scheduler.must_settle
    settle(bench, first)
    second = launched(bench)
    assert describe(second) == "a1 p1"
    assert not any(chunk.input_in_flight for chunk in second.chunks)


def test_blocks_are_not_taken_from_a_sequence_under_way() -> None:
    bench = make_bench("chunked_prefill", num_blocks=5)
    old, young = bench.add("old", prompt=7, output=5), bench.add("young", prompt=7, output=5)
    under_way: list[IterationPlan] = []
    preempted: list[Sequence] = []
    for _ in range(6):
        plan = launched(bench)
        under_way.append(plan)
        preempted += plan.preempted
        assert not any(seq.num_under_way for seq in plan.preempted)
        keep = int(bool(plan.chunks) and not bench.scheduler.must_settle)
        while len(under_way) > keep:
            settle(bench, under_way.pop(0))
    assert preempted == [young]
    assert old.phase == "running"
    assert old.num_output_tokens >= 2
