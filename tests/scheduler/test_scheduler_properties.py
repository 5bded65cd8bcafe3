"""Whatever arrives, in whatever order, cancelled whenever: everything ends and nothing leaks.

The simulated worker below does what a real one does around the scheduler, remote prefills included,
and keeps the content of every block, so that it sees a block written by two or read while wrong.
With `ahead`, it plans each iteration while the one before is under way, as the pipeline does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.config import SchedulerConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.host_tier import BlockCopy, HostTier
from tandem.scheduler import Scheduler
from tandem.scheduler.costs import work_of
from tandem.scheduler.policies import POLICIES
from tandem.scheduler.preemption import WAYS, Options, Way

MAX_MODEL_LEN = 40


@dataclass
class Arrival:
    """One request to come, and what will happen to it."""

    step: int
    prompt_len: int
    max_tokens: int
    priority: int
    remote: bool
    family: int  # prompts of one family share their first tokens
    cancel_after: int | None  # steps after its arrival
    lands_per_step: int
    prefill_dies_at: int | None  # KV tokens that land before its prefill worker is gone
    late_writes: bool  # cancelled while a transfer still writes
    ttft_objective: float = 0.0


ARRIVALS = st.builds(
    Arrival,
    step=st.integers(0, 30),
    prompt_len=st.integers(1, 24),
    max_tokens=st.integers(1, 14),
    priority=st.integers(0, 1),
    remote=st.booleans(),
    family=st.integers(0, 2),
    cancel_after=st.one_of(st.none(), st.none(), st.integers(0, 25)),
    lands_per_step=st.integers(1, 9),
    prefill_dies_at=st.one_of(st.none(), st.none(), st.integers(0, 20)),
    late_writes=st.booleans(),
    ttft_objective=st.sampled_from([0.0, 1.0, 9.0]),
)


@dataclass
class Worker:
    """A worker without a model: token p of a sequence follows from its prefix."""

    scheduler: Scheduler
    block_size: int
    ahead: bool = False
    under_way: list[IterationPlan] = field(default_factory=list)
    details: dict[Sequence, Arrival] = field(default_factory=dict)
    content: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    legs: dict[str, tuple[list[int], int]] = field(default_factory=dict)  # leg -> blocks, until
    finished: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, BlockCopy]] = field(default_factory=list)  # and when they end
    in_host: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    now: int = 0

    def submit(self, arrival: int, details: Arrival) -> None:
        tokens = tuple(10 * details.family + index % 3 for index in range(details.prompt_len))
        sampling = SamplingParams(max_tokens=details.max_tokens)
        request = Request(
            f"r{arrival}",
            tokens,
            len(tokens),
            sampling,
            priority=details.priority,
            tenant=f"t{details.family}",
            ttft_objective=details.ttft_objective,
        )
        self.scheduler.check_fits(request)
        seq = Sequence(request, arrival, details.remote, arrived_at=float(self.now))
        self.details[seq] = details
        self.scheduler.add(seq)

    def step(self) -> IterationPlan:
        waiting_before = list(self.scheduler.waiting)
        first = min(self.scheduler.running, key=self.scheduler.policy.precedence, default=None)
        plan = self.scheduler.schedule(float(self.now))
        self.check_plan(plan)
        self.copy()
        if self.scheduler.config.policy == "chunked_prefill":
            self.check_default_plan(plan, waiting_before)
        assert first not in plan.preempted or len(self.scheduler.running) == 0
        if self.ahead:
            self.scheduler.launch(plan)
        self.under_way.append(plan)
        keep = int(self.ahead and bool(plan.chunks) and not self.scheduler.must_settle)
        while len(self.under_way) > keep:
            self.settle(self.under_way.pop(0))
        for seq in plan.preempted:
            seq.remote = self.details[seq].remote and seq.arrival % 2 == 0
            self.scheduler.add(seq)
        self.receive()
        self.now += 1
        for leg in [leg for leg, (_, until) in self.legs.items() if until <= self.now]:
            self.scheduler.pool.release_transfer(self.legs.pop(leg)[0], leg)
        self.scheduler.pool.check_integrity()
        size, sequences = self.scheduler.pool.block_size, self.scheduler.num_running
        assert self.scheduler.num_unused_slots <= sequences * (size - 1)
        return plan

    def copy(self) -> None:
        """Copies end some steps after they began; what they write appears all at once, at the end,
        and what they read must not have changed since."""
        for copy in self.scheduler.take_copies():
            self.copies.append((self.now + copy.number % 3, copy))
        while self.copies and self.copies[0][0] <= self.now:
            _, copy = self.copies.pop(0)
            for pair in zip(copy.device_blocks, copy.host_blocks, strict=True):
                self.copy_block(*pair, to_host=copy.to_host)
            self.scheduler.copied(copy, 0.001, succeeded=copy.number % 5 != 0)

    def copy_block(self, on_device: int, in_host: int, *, to_host: bool) -> None:
        for offset in range(self.block_size):
            if to_host:
                self.in_host[in_host, offset] = self.content.get((on_device, offset), ())
            else:
                self.content[on_device, offset] = self.in_host[in_host, offset]

    def settle(self, plan: IterationPlan) -> None:
        """The end of an iteration: KV is written, tokens come out, for some there is no reader."""
        for chunk in plan.chunks:
            self.compute(chunk)
        self.scheduler.measured(work_of(plan.chunks), 0.01 + 0.001 * plan.num_tokens)
        self.scheduler.advance(plan)
        for chunk in plan.chunks:
            if chunk.samples and chunk.sequence.phase == "running":
                assert chunk.end == chunk.sequence.num_tokens, "a token is lost or comes twice"
                self.sample(chunk.sequence)

    def check_plan(self, plan: IterationPlan) -> None:
        """What holds under every policy."""
        config = self.scheduler.config
        assert plan.num_tokens <= config.max_batch_tokens
        assert self.scheduler.num_running <= config.max_running
        planned = [chunk.sequence for chunk in plan.chunks]
        assert len(set(planned)) == len(planned)
        for chunk in plan.chunks:
            assert chunk.length >= 1
            assert chunk.start == chunk.sequence.num_computed
            assert chunk.end <= chunk.sequence.num_tokens + chunk.sequence.num_in_flight
            assert chunk.end < chunk.sequence.request.max_len, "its end was known ahead"
            assert chunk.end <= len(chunk.sequence.block_table) * self.block_size
            assert chunk.sequence.phase == "running"
        assert not set(plan.preempted) & (set(planned) | set(plan.admitted))

    def check_default_plan(self, plan: IterationPlan, waiting_before: list[Sequence]) -> None:
        """What holds under chunked prefill."""
        planned = [chunk.sequence for chunk in plan.chunks]
        assert all(chunk.length <= self.scheduler.config.chunk_size for chunk in plan.chunks)
        assert not (plan.preempted and plan.admitted)
        # No starvation: those admitted are the first of the queue, in order.
        assert list(plan.admitted) == waiting_before[: len(plan.admitted)]
        assert waiting_before == sorted(waiting_before, key=lambda seq: seq.order)
        # The oldest that computes is never the one to give way to younger ones.
        assert all(a.order > b.order for a in plan.preempted for b in planned)

    def compute(self, chunk: ScheduledChunk) -> None:
        """Write the KV of a chunk; everything before it must be there and be this sequence's."""
        seq = chunk.sequence
        if not seq.block_table:
            assert not self.ahead, "blocks of an iteration under way were given back"
            return
        for position in range(chunk.start):
            assert self.content[self.slot(seq, position)] == tuple(seq.token_ids[: position + 1])
        self.write(seq, chunk.start, chunk.end)

    def write(self, seq: Sequence, start: int, end: int) -> None:
        tables = [s.block_table for s in self.details if s is not seq]
        for position in range(start, end):
            block, offset = self.slot(seq, position)
            assert not any(block in table for table in tables), "a shared block is written"
            under_transfer = [leg for leg, (blocks, _) in self.legs.items() if block in blocks]
            assert not under_transfer, "a block is written while a transfer writes it"
            self.content[block, offset] = tuple(seq.token_ids[: position + 1])

    def slot(self, seq: Sequence, position: int) -> tuple[int, int]:
        return seq.block_table[position // self.block_size], position % self.block_size

    def sample(self, seq: Sequence) -> None:
        self.scheduler.append(seq, 100 + seq.num_tokens % 5)
        if seq.num_tokens >= min(seq.request.max_len, MAX_MODEL_LEN):
            self.end(seq, cancelled=False)

    def receive(self) -> None:
        """KV lands for those that wait for it; the last piece brings the next token."""
        for seq in tuple(self.scheduler.receiving):
            if self.scheduler.is_restoring(seq):
                continue
            if not seq.remote:
                self.scheduler.fall_back(seq)
                continue
            details = self.details[seq]
            start = seq.num_computed
            end = min(start + details.lands_per_step, seq.num_tokens)
            if details.prefill_dies_at is not None and end > details.prefill_dies_at:
                self.scheduler.fall_back(seq)
                continue
            self.write(seq, start, end)
            self.scheduler.landed(seq, end)
            if end == seq.num_tokens:
                self.sample(seq)
                if seq.phase == "receiving":
                    self.scheduler.join(seq)

    def end(self, seq: Sequence, cancelled: bool) -> None:
        if cancelled and seq.phase == "receiving" and self.details[seq].late_writes:
            leg = f"leg:{seq.arrival}"
            blocks = seq.block_table[seq.num_computed // self.block_size :]
            self.scheduler.pool.hold_for_transfer(blocks, leg)
            self.legs[leg] = (blocks, self.now + 4)
        self.scheduler.finish(seq, None if cancelled else "length")
        self.finished.append(seq)


def simulate(worker: Worker, arrivals: list[Arrival]) -> list[Sequence]:
    """Run until everything has ended; the bound on steps is far above any honest run."""
    pending = sorted(enumerate(arrivals), key=lambda item: item[1].step)
    scheduler = worker.scheduler
    while (
        pending
        or scheduler.num_waiting
        or scheduler.num_running
        or worker.legs
        or worker.under_way
        or worker.copies
    ):
        while pending and pending[0][1].step <= worker.now:
            worker.submit(*pending.pop(0))
        for seq, details in worker.details.items():
            due = details.cancel_after is not None and seq.phase != "finished"
            if due and details.step + (details.cancel_after or 0) <= worker.now:
                worker.end(seq, cancelled=True)
        worker.step()
        assert worker.now < 200 + 60 * len(arrivals), "no progress"
    return list(worker.details)


def make_worker(
    num_blocks: int,
    block_size: int,
    prefix_cache: bool,
    policy: str = "",
    ahead: bool = False,
    host_blocks: int = 0,
    **limits: int,
) -> Worker:
    pool = BlockPool(num_blocks, block_size, prefix_cache)
    config = SchedulerConfig(
        policy=policy or "chunked_prefill",
        batch_size=3,
        batch_wait=2,
        decode_streak=2,
        ageing=3,
        waiting_bound=6,
        ttft_objective=4,
        itl_objective=0.02,
        **limits,
    )
    tier = HostTier(pool, host_blocks, spills=True) if host_blocks else None
    return Worker(Scheduler(config, pool, MAX_MODEL_LEN, host_tier=tier), block_size, ahead)


def force(worker: Worker, rng: Random) -> None:
    """Let chance choose among the ways out that are possible."""

    def choose(options: Options) -> Way:
        return rng.choice([way for way in WAYS if getattr(options, way) is not None])

    worker.scheduler.preemption.choose = choose  # type: ignore[method-assign]


@pytest.mark.parametrize("policy", POLICIES)
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=14),
    spare_blocks=st.integers(0, 12),
    block_size=st.sampled_from([1, 2, 4, 8]),
    prefix_cache=st.booleans(),
    max_batch_tokens=st.integers(1, 24),
    chunk_size=st.integers(1, 12),
    max_running=st.integers(1, 8),
    ahead=st.booleans(),
    host_blocks=st.integers(0, 24),
    seed=st.integers(0, 99),
)
@settings(max_examples=50)
def test_every_admitted_request_ends_and_nothing_leaks(
    policy: str,
    arrivals: list[Arrival],
    spare_blocks: int,
    block_size: int,
    prefix_cache: bool,
    max_batch_tokens: int,
    chunk_size: int,
    max_running: int,
    ahead: bool,
    host_blocks: int,
    seed: int,
) -> None:
    longest = max(min(a.prompt_len + a.max_tokens, MAX_MODEL_LEN) for a in arrivals)
    worker = make_worker(
        -(-longest // block_size) + 1 + spare_blocks,
        block_size,
        prefix_cache,
        policy,
        ahead,
        host_blocks,
        max_batch_tokens=max_batch_tokens,
        chunk_size=chunk_size,
        max_running=max_running,
    )
    force(worker, Random(seed))
    sequences = simulate(worker, arrivals)
    pool = worker.scheduler.pool
    assert len(sequences) == len(arrivals)
    assert sorted(seq.arrival for seq in worker.finished) == list(range(len(arrivals)))
    assert (pool.num_used, pool.holders()) == (0, {})
    if worker.scheduler.host_tier is not None:
        in_host = worker.scheduler.host_tier.pool
        in_host.check_integrity()
        assert (in_host.num_used, in_host.holders()) == (0, {})
    for seq in sequences:
        assert seq.phase == "finished"
        if seq.finish_reason == "length":
            assert seq.num_tokens == min(seq.request.max_len, MAX_MODEL_LEN)
            drawn = range(seq.request.prompt_len, seq.num_tokens)
            assert seq.token_ids[seq.request.prompt_len :] == [100 + n % 5 for n in drawn]


@pytest.mark.parametrize("policy", POLICIES)
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=8),
    spare_blocks=st.integers(0, 4),
    ahead=st.booleans(),
)
@settings(max_examples=15)
def test_the_same_arrivals_give_the_same_plans(
    policy: str, arrivals: list[Arrival], spare_blocks: int, ahead: bool
) -> None:
    def trace() -> list[tuple[int, int, int, tuple[int, ...]]]:
        limits = {"max_batch_tokens": 8, "chunk_size": 4, "max_running": 4}
        worker = make_worker(11 + spare_blocks, 4, True, policy, ahead, **limits)
        recorded: list[tuple[int, int, int, tuple[int, ...]]] = []
        compute = worker.compute

        def record(chunk: ScheduledChunk) -> None:
            table = tuple(chunk.sequence.block_table)
            recorded.append((chunk.sequence.arrival, chunk.start, chunk.length, table))
            compute(chunk)

        worker.compute = record  # type: ignore[method-assign]
        simulate(worker, arrivals)
        return recorded

    assert trace() == trace()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("host_blocks", [0, 64])
def test_a_tiny_pool_preempts_again_and_again_and_still_finishes_everything(
    ahead: bool, host_blocks: int
) -> None:
    arrivals = [
        Arrival(0, 8, 14, 0, remote, 0, None, 3, None, False)
        for remote in (False, True, False, True, False, False)
    ]
    worker = make_worker(
        13, 2, True, "", ahead, host_blocks, max_batch_tokens=8, chunk_size=4, max_running=6
    )
    force(worker, Random(1))
    sequences = simulate(worker, arrivals)
    assert sum(worker.scheduler.num_preempted.values()) >= 3
    outputs = {tuple(seq.token_ids) for seq in sequences}
    assert len(outputs) == 1, "preemption changed somebody's tokens"
    assert worker.scheduler.pool.num_used == 0
