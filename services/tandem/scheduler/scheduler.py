"""Which tokens of which sequences the next iteration computes, and who holds blocks for it.

Every change of a sequence's phase, tokens, block table and counters happens here or in what is
composed here: `holdings` (its blocks), `phases` (the queues), `out_of_blocks` (who gives way) and
`receiving` (KV from elsewhere). Not here: who goes first and how much at once (`policies`), the
model, the clock, the network, when a sequence has said enough (the worker calls `finish`).

Invariants, whatever the policy: a plan never exceeds `max_batch_tokens`; a sequence that waits for
blocks is overtaken by nobody behind it in the policy's line; a request that passed `check_fits` can
always finish alone, so that preempting the last by `precedence` never ends in a deadlock; blocks
that an iteration under way writes are held until it has ended.

Nobody is preempted by one that comes after it by `precedence`, which never changes: if one gave way
to another, the other never gives way to it. One that was preempted comes back only when there is a
block for every sequence that runs, itself included: before it is preempted again, some sequence has
drawn a block's worth of tokens, or another was admitted for the first time. So of n requests that
draw t tokens in all, each is preempted 1 + n + t / block_size times at most. Blocks that are pinned
for a copy to host memory may be missing meanwhile, and are not counted in this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

from tandem.core.config import SchedulerConfig
from tandem.core.errors import OverloadedError
from tandem.core.request import FinishReason, Request
from tandem.core.sequence import IterationPlan, Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.host_tier import BlockCopy, HostTier
from tandem.scheduler.costs import CostEstimator, Work
from tandem.scheduler.draft import Draft
from tandem.scheduler.fit import check_admissible, check_fits
from tandem.scheduler.holdings import Holdings
from tandem.scheduler.host_copies import HostCopies
from tandem.scheduler.out_of_blocks import OutOfBlocks
from tandem.scheduler.phases import Phases
from tandem.scheduler.policies import Policy, Steps, make_policy
from tandem.scheduler.preemption import Preemption, Way
from tandem.scheduler.prompt_room import PromptRoom
from tandem.scheduler.receiving import Receiving


class Scheduler:
    """The sequences of one worker: `schedule` → run the model → `advance` → `append` each sample.

    To schedule an iteration while another is under way, `launch` the plan when the model starts on
    it, and `schedule` the next one before its `advance`; iterations end in the order of `launch`.
    Between the two the drawn tokens are *in flight*: known to the device, not here.

    ::

        add -> waiting --schedule--> running ----------> finish
                  |                   ^   |
                  |     join/fall_back|   +--schedule--> preempted -> add
                  +----schedule--> receiving (remote, or KV in the host tier)

    With a host tier, `take_copies` after every `schedule`, carry them out in order, and report each
    to `copied`.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        max_model_len: int,
        policy: Policy | None = None,
        host_tier: HostTier | None = None,
        block_bytes: int = 0,
    ) -> None:
        self.config = config
        self.policy = policy or make_policy(config)
        self.pool = pool
        self.max_model_len = max_model_len
        self.costs = CostEstimator()
        self.preemption = Preemption(config, self.costs, block_bytes, pool.block_size)
        self._host = None if host_tier is None else HostCopies(host_tier, self.preemption)
        self.must_settle = False
        """Whether the next plan needs every iteration under way ended, and its tokens appended."""
        self.prompt_room: PromptRoom | None = None
        """Bounds prompts beside decode steps, where a worker computes them with its slack."""
        self.holdings = Holdings(pool, self._host)
        phases = self._phases = Phases(self.holdings)
        self.waiting = phases.waiting
        self.running = phases.running
        self.receiving = phases.receiving
        self._out_of_blocks = OutOfBlocks(
            *(pool, phases, self.holdings, self._host),
            *(self.preemption, self.policy, max_model_len),
        )
        self._incoming = Receiving(phases, self.holdings, pool.block_size)

    @property
    def host_tier(self) -> HostTier | None:
        """The second tier of KV blocks, if there is one."""
        return None if self._host is None else self._host.tier

    @property
    def num_preempted(self) -> Counter[Way]:
        """Sequences that gave way, or waited for a block, since the start."""
        return self._out_of_blocks.num_preempted

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks: those that compute and those that receive."""
        return len(self.running) + len(self.receiving)

    @property
    def num_unused_slots(self) -> int:
        """Slots of held blocks that neither a known token nor the next one of their sequence takes.

        This is all the fragmentation that block tables leave: less than one block per sequence.
        """
        held = (seq for queue in (self.running, self.receiving) for seq in queue)
        return sum(map(self.holdings.num_unused_slots, held))

    def check_fits(self, request: Request) -> None:
        """Raise `InvalidRequestError` if the request could not finish with the whole pool."""
        check_fits(request, self.pool, self.max_model_len)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence, or a preempted one at the place that its `order` keeps for it.

        Raises `OverloadedError` for a new one when the queue is full, and `InvalidRequestError` for
        one that could never be admitted and would block the queue for ever.
        """
        if seq.phase not in ("waiting", "preempted") or seq in self.waiting:
            raise ValueError(f"{seq.holder} is {seq.phase} and cannot be queued")
        check_admissible(seq.num_tokens, self.pool, self.max_model_len)
        if seq.phase == "waiting" and len(self.waiting) >= self.config.max_waiting:
            raise OverloadedError(f"the queue is full: {len(self.waiting)} requests wait")
        if seq.phase == "waiting":
            self.policy.arrived(seq, self.waiting)
        seq.phase = "waiting"
        self.waiting.add(seq)

    def peek_cached(self, seq: Sequence) -> int:
        """Return how many tokens of a sequence its prefix cache would give now. Takes no hold."""
        hashes = self.holdings.findable_hashes(seq)
        return len(self.pool.match_prefix(hashes)) * self.pool.block_size

    def blocks_to_admit(self, seq: Sequence) -> int:
        """Return how many blocks a sequence would take from the pool; 0 if it holds its own."""
        return 0 if seq.block_table else self.holdings.num_blocks(seq.num_tokens + 1)

    def most_blocks(self, seq: Sequence) -> int:
        """Return how many blocks a sequence takes when it is as long as it may become."""
        return self.holdings.num_blocks(min(seq.request.max_len, self.max_model_len))

    def has_room(self, seq: Sequence) -> bool:
        """Whether a sequence holds blocks for all of its tokens. One that a prefill worker decoded
        for a while may have grown past those that were reserved."""
        return seq.num_tokens <= len(seq.block_table) * self.pool.block_size

    def withdraw(self, seq: Sequence) -> None:
        """Take a sequence out of the queue; `add` puts it back at its place."""
        self.waiting.discard(seq)

    # ------------------------------------------------------------------ one iteration

    def schedule(self, now: float = 0.0) -> IterationPlan:
        """Plan the next iteration. `launch` or `advance` must follow before the next call.

        With iterations under way, sequences are assumed to get their tokens and go on. One whose
        blocks would have to be taken from a sequence under way is left out, and `must_settle` says
        so, as it does when the next draw depends on the one in flight (`SamplingParams.penalises`).

        `now`: seconds on the clock that `Sequence.arrived_at` is of. A plan may be empty although
        sequences wait, for a policy may wait for time to pass: ask again later.
        """
        draft = self._compose(now, may_wait=True)
        if draft.waits and not draft.chunks and not any(s.num_under_way for s in self.running):
            draft = self._compose(now, may_wait=False)  # nobody would ever free a block
        self.must_settle = draft.must_settle
        if self._host is not None:
            self._host.tier.spill()
        plan = draft.plan()
        self.policy.planned(plan)
        return plan

    def _compose(self, now: float, *, may_wait: bool) -> Draft:
        budget = self.config.max_batch_tokens
        draft = Draft(now, budget, self.running, self.waiting, self.receiving)
        draft.may_wait = may_wait
        draft.admits = self.num_running < self.config.max_running
        for wish in self.policy.tasks(draft):
            if isinstance(wish, Steps):
                self._grant_steps(wish.sequences, draft)
            elif wish.max_tokens >= 1:
                self._grant(wish.sequence, wish.max_tokens, draft)
            if draft.tokens_left == 0 and draft.is_complete:
                break
        return draft

    def launch(self, plan: IterationPlan) -> None:
        """Note that `plan` computes from now on and that the next is planned before it has ended.

        Nothing that it computes is published before its `advance`.
        """
        max_model_len = self.max_model_len
        for seq, start, length, samples, _ in plan.chunks:
            seq.num_computed = end = start + length
            seq.num_under_way += 1
            if not samples:
                continue
            if seq.penalises:
                self.must_settle = True
            elif end + 1 < seq.max_len and end + 1 < max_model_len:
                seq.num_in_flight += 1

    def measured(self, work: Work, seconds: float) -> None:
        """Learn, and tell the policy, how long an iteration with `work` in it took."""
        self.measured_run(work, (seconds,))
        self.policy.measured(work, seconds)

    def measured_run(self, work: Work, seconds: Rows[float]) -> None:
        """Learn how long the first of some iterations took, and the equal decode steps after it.

        The same as `measured` after every one of them, for a policy that does not learn.
        """
        self.costs.measured_run(work, seconds)
        self.preemption.measured_run(work, seconds)

    def advance(self, plan: IterationPlan) -> None:
        """Note that the chunks of `plan` are computed. Those of sequences that left meanwhile count
        for nothing: their blocks are given back now if they were held for this iteration.

        Must be called for every launched plan, also for one that failed.
        """
        block_size = self.pool.block_size
        for seq, start, length, _, _ in plan.chunks:
            end = start + length
            if seq.num_under_way:
                seq.num_under_way -= 1
            elif seq.phase == "running":
                seq.num_computed = end
            if seq.phase == "running":
                if start // block_size != end // block_size:
                    self.holdings.publish(seq, start, end)
            elif seq.phase == "finished" and not seq.num_under_way:
                self.holdings.release(seq)

    def append(self, seq: Sequence, token_id: int) -> None:
        """Add a sampled token; that of a remote sequence came from a prefill worker."""
        if not (seq.phase in ("running", "receiving") or (seq.phase == "waiting" and seq.remote)):
            raise ValueError(f"{seq.holder} is {seq.phase} and takes no tokens")
        seq.token_ids.append(token_id)
        if seq.num_in_flight:
            seq.num_in_flight -= 1

    def _grant_steps(self, sequences: Rows[Sequence], draft: Draft) -> None:
        """Grant one token of each of `sequences`, one after the other."""
        rest = iter(sequences)
        while (seq := draft.add_steps(rest, self.pool.block_size)) is not None:
            self._grant(seq, 1, draft)
            if draft.tokens_left == 0 and draft.is_complete:
                return

    def _grant(self, seq: Sequence, limit: int, draft: Draft) -> None:
        """Let a sequence compute up to `limit` tokens if budget, blocks and places allow."""
        if seq.phase == "waiting":
            self._admit(seq, limit, draft)
        elif seq.phase == "running" and seq not in draft.chunks and draft.tokens_left:
            # Blocks of prompts were reserved at admission; 0: a sample is awaited.
            missing = seq.num_uncomputed
            if missing > 1:
                limit = min(limit, self._room_for_prompts(draft))
            length = min(limit, missing)
            end = seq.num_computed + length
            if length > 0 and (
                end <= len(seq.block_table) * self.pool.block_size
                or self._out_of_blocks.secure(seq, end, draft)
            ):
                draft.add_chunk(seq, length)

    def _room_for_prompts(self, draft: Draft) -> int:
        """Prompt tokens that this iteration can still take."""
        if self.prompt_room is None:
            return draft.tokens_left
        if draft.prompt_room is None:
            limit = self.config.max_batch_tokens
            draft.prompt_room = self.prompt_room.tokens(
                draft.decoding, self.costs, limit, num_receiving=len(self.receiving)
            )
        return min(draft.tokens_left, draft.prompt_room - draft.prompt_tokens)

    # ------------------------------------------------------------------ admission

    def _admit(self, seq: Sequence, limit: int, draft: Draft) -> None:
        """Let a sequence out of the queue, or end admission for this iteration."""
        if not draft.admits or seq not in self.waiting:
            return
        if not seq.remote:
            limit = min(limit, draft.tokens_left, self._room_for_prompts(draft))
        # One block per running sequence stays free, so that these need not be preempted at once;
        # one that was preempted before leaves one for itself, too.
        spare = self.num_running + (seq.was_preempted and self.num_running > 0)
        if not limit or not self.holdings.reserve(seq, spare):
            draft.admits = False
            return
        receives = seq.remote or self.is_restoring(seq)
        self._phases.move(seq, "receiving" if receives else "running")
        draft.admitted.append(seq)
        draft.admits = self.num_running < self.config.max_running
        if not receives:
            draft.add_chunk(seq, min(limit, seq.num_uncomputed))

    # ------------------------------------------------------------------ the host tier

    def take_copies(self) -> list[BlockCopy]:
        """Return the copies to carry out that the last plans began."""
        return self._host.tier.take_copies() if self._host is not None else []

    def is_restoring(self, seq: Sequence) -> bool:
        """Whether KV of an admitted sequence is being copied back from the host tier."""
        return self._host is not None and self._host.is_copying(seq)

    def copied(self, copy: BlockCopy, seconds: float, *, succeeded: bool = True) -> Sequence | None:
        """Take the end of a copy. Returns the sequence, still receiving, whose KV is back: `join`,
        `fall_back` or a prefill worker has it go on."""
        if self._host is None:
            raise ValueError("there is no host tier")
        waited = self._host.done(copy, seconds, succeeded)
        if waited is None:
            return None
        seq, num_tokens = waited
        if copy.to_host:
            if not succeeded:
                self._host.drop(seq, seq.holder)
            return None
        if num_tokens:
            self.landed(seq, num_tokens)
        return seq

    # ------------------------------------------------------------------ receiving KV, and the end

    def landed(self, seq: Sequence, num_tokens: int) -> None:
        """Note that a receiving sequence has the KV of its first `num_tokens` tokens in place."""
        self._incoming.landed(seq, num_tokens)

    def join(self, seq: Sequence) -> None:
        """Let a receiving sequence decode: all KV but the newest token's must be in place."""
        self._incoming.join(seq)

    def fall_back(self, seq: Sequence) -> None:
        """Let a receiving sequence compute what has not landed itself; it keeps its blocks."""
        self._incoming.fall_back(seq)

    def hand_out(self, seq: Sequence) -> None:
        """Let a prefill worker compute what is left of a running prompt: `fall_back` undone.

        Raises ValueError if it does not run, has too little to compute, or lacks blocks.
        """
        self._incoming.hand_out(seq)

    def finish(self, seq: Sequence, reason: FinishReason | None) -> None:
        """End a sequence in whatever phase it is; None: cancelled. Ending it twice changes nothing.

        Gives back its request holds only, and those when no iteration under way writes its blocks
        any more: what a transfer still holds stays held.
        """
        if seq.phase != "finished":
            self._phases.leave(seq, "finished")
            if self._host is not None:
                self._host.left(seq)
                self._host.drop(seq, seq.holder)
            self._out_of_blocks.forget(seq)
            seq.finish_reason = reason
            if reason is not None:
                most = min(seq.request.max_len, self.max_model_len) - seq.request.prompt_len
                self.preemption.ended(seq.num_output_tokens, most)
