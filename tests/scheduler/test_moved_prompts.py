"""A prompt that goes back and forth between two workers: nothing computed is lost or done twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import SchedulerConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.scheduler import Scheduler

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("landed"), st.integers(1, 20)),
        st.tuples(st.just("cut"), st.just(0)),
        st.tuples(st.just("iteration"), st.just(0)),
        st.tuples(st.just("hand_out"), st.just(0)),
    ),
    max_size=40,
)


@given(num_tokens=st.integers(2, 120), steps=STEPS)
def test_the_ledger_of_a_cut_leg(num_tokens: int, steps: list[tuple[str, int]]) -> None:
    config = SchedulerConfig(max_batch_tokens=16, chunk_size=16)
    pool = BlockPool(num_blocks=64, block_size=4)
    scheduler = Scheduler(config, pool, max_model_len=200)
    request = Request("r", tuple(range(num_tokens)), num_tokens, SamplingParams(max_tokens=2))
    seq = Sequence(request, arrival=0, remote=True)
    scheduler.add(seq)
    scheduler.schedule()
    blocks = list(seq.block_table)
    computed_here = landed = 0
    for step, amount in steps:
        before = seq.num_computed
        if step == "landed" and seq.phase == "receiving":
            scheduler.landed(seq, min(before + amount, num_tokens - 1))
            landed += seq.num_computed - before
        elif step == "cut" and seq.phase == "receiving":
            scheduler.fall_back(seq)
        elif step == "iteration" and seq.phase == "running" and seq.num_uncomputed:
            plan = scheduler.schedule()
            scheduler.advance(plan)
            computed_here += plan.num_tokens
        elif step == "hand_out" and seq.phase == "running" and seq.num_uncomputed > 1:
            scheduler.hand_out(seq)
        assert seq.num_computed >= before
        assert seq.num_computed == computed_here + landed
        assert seq.block_table == blocks
        pool.check_integrity()
    scheduler.finish(seq, None)
    assert pool.num_used == 0
