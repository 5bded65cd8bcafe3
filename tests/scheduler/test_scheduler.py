"""The scheduler, one promise at a time: admission, budget, preemption, receiving, the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.core.config import SchedulerConfig
from tandem.core.errors import InvalidRequestError, OverloadedError
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.scheduler import Scheduler

BLOCK = 4


def make_scheduler(num_blocks: int = 64, **limits: int) -> Scheduler:
    limits = {"max_batch_tokens": 16, "chunk_size": 8, "max_running": 8, **limits}
    return Scheduler(SchedulerConfig(**limits), BlockPool(num_blocks, BLOCK), max_model_len=200)


def make_seq(
    arrival: int,
    prompt: int | list[int],
    *,
    max_tokens: int = 20,
    priority: int = 0,
    remote: bool = False,
    prompt_logprobs: int | None = None,
    salt: str = "",
) -> Sequence:
    """A sequence whose prompt is of its own, unless the tokens are given."""
    tokens = (
        prompt if isinstance(prompt, list) else [1000 * (arrival + 1) + i for i in range(prompt)]
    )
    sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    request = Request(
        f"r{arrival}",
        tuple(tokens),
        len(tokens),
        sampling,
        priority=priority,
        cache_salt=salt,
    )
    return Sequence(request, arrival, remote)


def step(scheduler: Scheduler) -> IterationPlan:
    """One iteration of an engine that always samples token 7."""
    plan = scheduler.schedule()
    samplers = [chunk.sequence for chunk in plan.chunks if chunk.samples]
    scheduler.advance(plan)
    for seq in samplers:
        scheduler.append(seq, 7)
    scheduler.pool.check_integrity()
    return plan


def lengths(plan: IterationPlan) -> dict[int, int]:
    return {chunk.sequence.arrival: chunk.length for chunk in plan.chunks}


def test_a_prompt_is_computed_in_chunks_and_then_decodes_one_token_at_a_time() -> None:
    scheduler = make_scheduler(max_batch_tokens=8, chunk_size=6)
    seq = make_seq(0, 14)
    scheduler.add(seq)
    plans = [step(scheduler) for _ in range(5)]
    assert [(c.start, c.length, c.end) for plan in plans for c in plan.chunks] == [
        (0, 6, 6),
        (6, 6, 12),
        (12, 2, 14),
        (14, 1, 15),
        (15, 1, 16),
    ]
    assert plans[0].admitted == (seq,)
    assert seq.token_ids[14:] == [7, 7, 7]
    assert seq.num_uncomputed == 1


def test_several_short_prompts_share_one_iteration() -> None:
    scheduler = make_scheduler()
    for arrival, length in enumerate((5, 3, 12)):
        scheduler.add(make_seq(arrival, length))
    assert lengths(step(scheduler)) == {0: 5, 1: 3, 2: 8}


def test_decodes_go_before_chunks_and_chunks_before_admission() -> None:
    scheduler = make_scheduler(max_batch_tokens=4, chunk_size=4)
    scheduler.add(make_seq(0, 2))
    step(scheduler)
    scheduler.add(make_seq(1, 9))
    assert lengths(step(scheduler)) == {0: 1, 1: 3}
    late = make_seq(2, 2)
    scheduler.add(late)
    plan = step(scheduler)
    assert lengths(plan) == {0: 1, 1: 3}
    assert (plan.admitted, late.phase, late.block_table) == ((), "waiting", [])
    assert lengths(step(scheduler)) == {0: 1, 1: 3}
    assert lengths(step(scheduler)) == {0: 1, 1: 1, 2: 2}


def test_a_sequence_that_sampled_is_not_planned_before_its_token_is_appended() -> None:
    scheduler = make_scheduler()
    seq = make_seq(0, 3)
    scheduler.add(seq)
    scheduler.advance(scheduler.schedule())
    assert scheduler.schedule().chunks == ()
    scheduler.append(seq, 7)
    assert lengths(scheduler.schedule()) == {0: 1}


def test_admission_reserves_room_for_one_token_more_than_it_has() -> None:
    scheduler = make_scheduler()
    scheduler.add(seq := make_seq(0, 2 * BLOCK))
    scheduler.schedule()
    assert len(seq.block_table) == 3


def test_lower_priority_number_first_then_arrival() -> None:
    scheduler = make_scheduler(max_running=1)
    sequences = [make_seq(0, 3, priority=1), make_seq(1, 3), make_seq(2, 3, priority=1)]
    sequences.append(make_seq(3, 3))
    for seq in sequences:
        scheduler.add(seq)
    served = []
    while scheduler.num_waiting:
        served += [seq.arrival for seq in step(scheduler).admitted]
        scheduler.finish(next(iter(scheduler.running)), "stop")
    assert served == [1, 3, 0, 2]


def test_nobody_overtakes_a_head_of_the_line_that_does_not_fit() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add(first := make_seq(0, 15, max_tokens=5))
    step(scheduler)
    scheduler.add(big := make_seq(1, 15, max_tokens=5))
    scheduler.add(small := make_seq(2, 1))
    assert step(scheduler).admitted == ()
    scheduler.finish(first, "stop")
    assert step(scheduler).admitted == (big, small)


def test_admission_leaves_one_block_per_running_sequence_free() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_seq(0, 3))
    scheduler.add(beside := make_seq(1, 2 * BLOCK))
    assert beside not in step(scheduler).admitted
    scheduler.finish(next(iter(scheduler.running)), "stop")
    assert beside in step(scheduler).admitted


def test_the_youngest_is_preempted_and_comes_back_at_the_front() -> None:
    scheduler = make_scheduler(num_blocks=6, max_batch_tokens=32, chunk_size=32)
    old, young = make_seq(0, 7), make_seq(1, 7)
    scheduler.add(old)
    scheduler.add(young)
    plans = [step(scheduler) for _ in range(6)]
    assert [seq for plan in plans for seq in plan.preempted] == []
    assert scheduler.pool.num_free == 0
    assert lengths(plans[-1]) == {0: 1, 1: 1}
    plan = step(scheduler)
    assert plan.preempted == (young,)
    assert lengths(plan) == {0: 1}
    assert (young.phase, young.block_table, young.num_computed) == ("preempted", [], 0)
    assert young.num_tokens == 7 + 6
    scheduler.add(make_seq(2, 1))
    scheduler.add(young)
    assert next(iter(scheduler.waiting)) is young


def test_a_victim_whose_turn_to_decode_was_still_to_come_is_not_planned() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(old := make_seq(0, 7))
    scheduler.add(young := make_seq(1, 1, remote=True))
    while old.num_tokens < 3 * BLOCK + 1:
        assert step(scheduler).preempted == ()
    scheduler.fall_back(young)
    assert young.num_uncomputed == 1
    plan = step(scheduler)
    assert plan.preempted == (young,)
    assert lengths(plan) == {0: 1}
    assert young.block_table == []


def test_a_preempted_sequence_recomputes_prompt_and_outputs_and_goes_on() -> None:
    scheduler = make_scheduler(num_blocks=6, max_batch_tokens=32, chunk_size=32)
    scheduler.add(old := make_seq(0, 7))
    scheduler.add(young := make_seq(1, 7))
    while not step(scheduler).preempted:
        pass
    tokens = list(young.token_ids)
    scheduler.add(young)
    scheduler.finish(old, "stop")
    plan = step(scheduler)
    assert plan.admitted == (young,)
    assert young.token_ids[:-1] == tokens
    assert plan.chunks[0].end == len(tokens)
    assert young.num_cached > 0  # its own blocks were still in the prefix cache


def test_nothing_is_admitted_in_an_iteration_that_preempts() -> None:
    scheduler = make_scheduler(num_blocks=5, max_batch_tokens=32, chunk_size=32, max_running=3)
    scheduler.add(make_seq(0, 7))
    scheduler.add(make_seq(1, 7))
    while not (plan := step(scheduler)).preempted:
        if scheduler.num_running == 2 and not scheduler.num_waiting:
            scheduler.add(make_seq(2, 1))
    assert plan.admitted == ()
    assert scheduler.num_waiting == 1


def test_prefix_of_a_finished_prompt_is_not_computed_again() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, chunk_size=64)
    tokens = list(range(18))
    scheduler.add(maker := make_seq(0, tokens))
    step(scheduler)
    scheduler.add(user := make_seq(1, tokens))
    plan = step(scheduler)
    assert user.num_cached == 16
    assert lengths(plan) == {0: 1, 1: 2}
    assert user.block_table[:4] == maker.block_table[:4]


def test_at_least_one_token_is_computed_even_when_everything_is_cached() -> None:
    scheduler = make_scheduler()
    tokens = list(range(2 * BLOCK))
    scheduler.add(maker := make_seq(0, tokens))
    step(scheduler)
    scheduler.finish(maker, "stop")
    scheduler.add(user := make_seq(1, tokens))
    assert lengths(step(scheduler)) == {1: BLOCK}
    assert user.num_cached == BLOCK


@pytest.mark.parametrize("other", [{"salt": "s"}, {"prompt_logprobs": 0}])
def test_another_salt_or_prompt_logprobs_do_not_hit(other: dict[str, object]) -> None:
    scheduler = make_scheduler(max_batch_tokens=64, chunk_size=64)
    tokens = list(range(12))
    scheduler.add(make_seq(0, tokens))
    step(scheduler)
    scheduler.add(seq := make_seq(1, tokens, **other))  # type: ignore[arg-type]
    assert lengths(step(scheduler))[1] == 12
    assert seq.num_cached == 0


def test_prompt_logprobs_that_are_out_already_do_not_stop_a_hit() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, chunk_size=64)
    scheduler.add(make_seq(0, list(range(12))))
    step(scheduler)
    request = Request("r", tuple(range(12)), 9, SamplingParams(max_tokens=9, prompt_logprobs=1))
    scheduler.add(resumed := Sequence(request, arrival=1))
    step(scheduler)
    assert resumed.num_cached == 8


def test_remote_sequences_are_admitted_without_budget_and_are_in_no_chunk() -> None:
    scheduler = make_scheduler(max_batch_tokens=4)
    scheduler.add(make_seq(0, 20))
    scheduler.add(remote := make_seq(1, 20, remote=True))
    plan = step(scheduler)
    assert lengths(plan) == {0: 4}
    assert remote in plan.admitted
    assert (remote.phase, len(remote.block_table)) == ("receiving", 6)
    assert scheduler.num_running == 2
    assert list(scheduler.receiving) == [remote]


def test_received_kv_is_joined_and_decodes_in_the_next_iteration() -> None:
    scheduler = make_scheduler()
    scheduler.add(seq := make_seq(0, 3 * BLOCK, remote=True))
    scheduler.schedule()
    scheduler.landed(seq, 2 * BLOCK)
    scheduler.landed(seq, BLOCK)  # late news of an earlier piece
    assert seq.num_computed == 2 * BLOCK
    assert len(scheduler.pool.match_prefix(seq.block_hashes)) == 2
    with pytest.raises(ValueError, match="KV of 8 of 12"):
        scheduler.join(seq)
    scheduler.append(seq, 7)
    scheduler.landed(seq, 3 * BLOCK)
    scheduler.join(seq)
    assert (seq.phase, seq.remote) == ("running", False)
    assert len(scheduler.pool.match_prefix(seq.block_hashes)) == 3
    assert [(c.start, c.length) for c in scheduler.schedule().chunks] == [(3 * BLOCK, 1)]


def test_the_block_of_the_newest_token_is_findable_once_its_sequence_joins() -> None:
    scheduler = make_scheduler()
    scheduler.add(seq := make_seq(0, 2 * BLOCK, remote=True))
    scheduler.schedule()
    scheduler.landed(seq, 2 * BLOCK)
    assert len(scheduler.pool.match_prefix(seq.block_hashes)) == 1
    scheduler.append(seq, 7)
    scheduler.join(seq)
    assert len(scheduler.pool.match_prefix(seq.block_hashes)) == 2


def test_a_landed_prefix_is_shared_before_the_rest_arrives() -> None:
    scheduler = make_scheduler()
    tokens = list(range(20))
    scheduler.add(first := make_seq(0, tokens, remote=True))
    scheduler.schedule()
    scheduler.landed(first, 9)
    scheduler.add(second := make_seq(1, tokens, remote=True))
    scheduler.schedule()
    assert second.num_cached == 8


@pytest.mark.parametrize("landed", [0, 5, 2 * BLOCK, 3 * BLOCK])
def test_fall_back_computes_what_has_not_landed_and_at_least_the_last_token(landed: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(seq := make_seq(0, 3 * BLOCK, remote=True))
    scheduler.schedule()
    scheduler.landed(seq, landed)
    before = list(seq.block_table)
    scheduler.fall_back(seq)
    assert seq.block_table == before
    findable = len(scheduler.pool.match_prefix(seq.block_hashes))
    chunks: list[ScheduledChunk] = []
    while not chunks or chunks[-1].end < 12:
        chunks += step(scheduler).chunks
    start = min(landed, 3 * BLOCK - 1)
    assert chunks[0].start == start
    assert findable * BLOCK <= start, "a block that others can find is written again"
    assert seq.token_ids[12:] == [7]


def test_only_receiving_sequences_receive() -> None:
    scheduler = make_scheduler()
    scheduler.add(seq := make_seq(0, 5))
    refused: list[Callable[[], None]] = [
        lambda: scheduler.landed(seq, 1),
        lambda: scheduler.join(seq),
        lambda: scheduler.fall_back(seq),
        lambda: scheduler.append(seq, 7),
        lambda: scheduler.add(seq),
    ]
    for operation in refused:
        with pytest.raises(ValueError, match="waiting"):
            operation()
    scheduler.add(remote := make_seq(1, 5, remote=True))
    scheduler.schedule()
    with pytest.raises(ValueError, match="KV of 6 of 5"):
        scheduler.landed(remote, 6)


@pytest.mark.parametrize("window", ["waiting", "prompt", "decode", "receiving", "preempted"])
def test_cancel_in_every_window_frees_everything_once(window: str) -> None:
    scheduler = make_scheduler(num_blocks=6)
    if window == "preempted":
        scheduler.add(other := make_seq(0, 7))
        scheduler.add(seq := make_seq(1, 7))
        while not step(scheduler).preempted:
            pass
        scheduler.finish(other, "stop")
    else:
        scheduler.add(seq := make_seq(1, 12, remote=window == "receiving"))
        for _ in range({"waiting": 0, "decode": 3}.get(window, 1)):
            step(scheduler)
    scheduler.finish(seq, None)
    scheduler.finish(seq, "stop")
    assert (seq.phase, seq.finish_reason) == ("finished", None)
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 0)
    assert scheduler.pool.num_used == 0
    scheduler.pool.check_integrity()
    assert scheduler.schedule() == IterationPlan(())


def test_finishing_leaves_the_holds_of_transfers_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(seq := make_seq(0, 8))
    step(scheduler)
    blocks = list(seq.block_table)
    scheduler.pool.hold_for_transfer(blocks, "leg:1")
    scheduler.finish(seq, "stop")
    assert scheduler.pool.holders() == {"leg:1": len(blocks)}
    scheduler.pool.release_transfer(blocks, "leg:1")
    assert scheduler.pool.num_used == 0


def test_a_sequence_cancelled_while_its_iteration_runs_stays_finished() -> None:
    scheduler = make_scheduler()
    scheduler.add(seq := make_seq(0, 8))
    plan = scheduler.schedule()
    scheduler.finish(seq, None)
    scheduler.advance(plan)
    assert (seq.num_computed, scheduler.pool.num_used) == (0, 0)
    with pytest.raises(ValueError, match="finished"):
        scheduler.append(seq, 7)


def test_the_queue_is_bounded_for_new_sequences_but_not_for_preempted_ones() -> None:
    scheduler = make_scheduler(num_blocks=6, max_waiting=1)
    scheduler.add(make_seq(0, 7))
    step(scheduler)
    scheduler.add(make_seq(1, 7))
    while not (plan := step(scheduler)).preempted:
        pass
    scheduler.add(make_seq(2, 1))
    with pytest.raises(OverloadedError, match="1 requests wait"):
        scheduler.add(make_seq(3, 1))
    scheduler.add(plan.preempted[0])
    assert scheduler.num_waiting == 2


def test_two_requests_of_one_name_do_not_mix() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, chunk_size=64)
    sequences = [
        Sequence(Request("same", tuple(range(12)), 12, SamplingParams(max_tokens=4)), arrival)
        for arrival in range(2)
    ]
    for seq in sequences:
        scheduler.add(seq)
        step(scheduler)
    assert sequences[1].num_cached == 8
    scheduler.finish(sequences[0], "stop")
    assert scheduler.pool.holders() == {sequences[1].holder: len(sequences[1].block_table)}


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(num_blocks=6)
    scheduler.check_fits(make_seq(0, 10, max_tokens=14).request)
    with pytest.raises(InvalidRequestError, match=r"25 tokens.* 7 KV blocks .* has 6") as caught:
        scheduler.check_fits(make_seq(0, 10, max_tokens=15).request)
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidRequestError, match=r"200 tokens.*context of 200"):
        scheduler.check_fits(make_seq(0, 200).request)
    with pytest.raises(InvalidRequestError, match=r"7 KV blocks.* has 6"):
        scheduler.add(make_seq(0, 6 * BLOCK))
    assert scheduler.num_waiting == 0


def test_max_tokens_beyond_the_context_counts_only_up_to_the_context() -> None:
    scheduler = make_scheduler(num_blocks=50)
    scheduler.check_fits(make_seq(0, 10, max_tokens=10**6).request)
