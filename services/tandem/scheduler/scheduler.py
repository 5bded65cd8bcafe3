"""Which tokens of which sequences the next iteration computes, and who holds blocks for it.

Every change of a sequence's phase, tokens, block table and counters happens here. Not here: the
model, the clock, the network, when a sequence has said enough (the worker calls `finish`).

Invariants: a plan never exceeds `max_batch_tokens`; nobody in the queue is overtaken by one of
later `order`; a request that passed `check_fits` can always finish alone, so that preempting the
youngest never ends in a deadlock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.core.config import SchedulerConfig
from tandem.core.errors import InvalidRequestError, OverloadedError
from tandem.core.request import FinishReason, Request
from tandem.core.sequence import IterationPlan, Phase, ScheduledChunk, Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.hashing import extend_hashes
from tandem.scheduler.sequence_queue import SequenceQueue


def holder_of(seq: Sequence) -> str:
    """The name under which a sequence holds blocks; its arrival tells equal request ids apart."""
    return f"{seq.request.request_id}#{seq.request.attempt}@{seq.arrival}"


@dataclass(slots=True)
class _Draft:
    """A plan while it is being made."""

    budget: int
    chunks: list[ScheduledChunk] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    def add_chunk(self, seq: Sequence, limit: int) -> None:
        length = min(seq.num_uncomputed, limit, self.budget)
        self.chunks.append(ScheduledChunk(seq, seq.num_computed, length))
        self.budget -= length

    def plan(self) -> IterationPlan:
        return IterationPlan(tuple(self.chunks), tuple(self.admitted), tuple(self.preempted))


class Scheduler:
    """The sequences of one worker: `schedule` → run the model → `advance` → `append` each sample.

    ::

        add -> waiting --schedule--> running ----------> finish
                  |                   ^   |
                  |     join/fall_back|   +--schedule--> preempted -> add
                  +----schedule--> receiving (remote)
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool, max_model_len: int) -> None:
        self.config = config
        self.pool = pool
        self.max_model_len = max_model_len
        self.waiting = SequenceQueue()
        self.running = SequenceQueue()
        self.receiving = SequenceQueue()
        self._queues: dict[Phase, SequenceQueue] = {
            "waiting": self.waiting,
            "running": self.running,
            "receiving": self.receiving,
        }

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks: those that compute and those that receive."""
        return len(self.running) + len(self.receiving)

    def check_fits(self, request: Request) -> None:
        """Raise `InvalidRequestError` if the request could not finish with the whole pool."""
        self._check_context(len(request.token_ids))
        most_tokens = min(request.max_len, self.max_model_len)
        needed = self._num_blocks(most_tokens)
        if needed > self.pool.num_blocks:
            raise InvalidRequestError(
                f"prompt and max_tokens make up to {most_tokens} tokens, which need {needed} KV "
                f"blocks of {self.pool.block_size} tokens; a worker has {self.pool.num_blocks}",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence, or a preempted one at the place that its `order` keeps for it.

        Raises `OverloadedError` for a new one when the queue is full, and `InvalidRequestError` for
        one that could never be admitted and would block the queue for ever.
        """
        if seq.phase not in ("waiting", "preempted") or seq in self.waiting:
            raise ValueError(f"{holder_of(seq)} is {seq.phase} and cannot be queued")
        self._check_context(seq.num_tokens)
        needed = self._num_blocks(seq.num_tokens + 1)
        if needed > self.pool.num_blocks:
            raise InvalidRequestError(
                f"{seq.num_tokens} tokens and one more need {needed} KV blocks; this worker has "
                f"{self.pool.num_blocks}",
                code="context_length_exceeded",
            )
        if seq.phase == "waiting" and len(self.waiting) >= self.config.max_waiting:
            raise OverloadedError(f"the queue is full: {len(self.waiting)} requests wait")
        seq.phase = "waiting"
        self.waiting.add(seq)

    def peek_cached(self, seq: Sequence) -> int:
        """Return how many tokens of a sequence its prefix cache would give now. Takes no hold."""
        return len(self._match_prefix(seq)) * self.pool.block_size

    def withdraw(self, seq: Sequence) -> None:
        """Take a sequence out of the queue; `add` puts it back at its place."""
        self.waiting.discard(seq)

    # ------------------------------------------------------------------ one iteration

    def schedule(self) -> IterationPlan:
        """Plan the next iteration. `advance` must follow before the next call."""
        draft = _Draft(self.config.max_batch_tokens)
        self._plan_decodes(draft)
        self._plan_prompts(draft)
        if not draft.preempted:
            self._admit(draft)
        return draft.plan()

    def advance(self, plan: IterationPlan) -> None:
        """Note that the chunks of `plan` are computed. Skips sequences that left meanwhile."""
        for chunk in plan.chunks:
            seq = chunk.sequence
            if seq.phase == "running":
                seq.num_computed = chunk.end
                self._publish(seq, chunk.start, chunk.end)

    def append(self, seq: Sequence, token_id: int) -> None:
        """Add a sampled token (or, while receiving, the one that the prefill worker sampled)."""
        if seq.phase not in ("running", "receiving"):
            raise ValueError(f"{holder_of(seq)} is {seq.phase} and takes no tokens")
        seq.token_ids.append(token_id)

    def _plan_decodes(self, draft: _Draft) -> None:
        """One token for each sequence that decodes, first served first."""
        for seq in tuple(self.running):
            if draft.budget == 0:
                return
            if seq.num_uncomputed != 1 or seq.phase != "running":
                continue  # a prompt, a sample that is awaited, or preempted by an older one above
            if self._secure_blocks(seq, draft):
                draft.add_chunk(seq, 1)

    def _plan_prompts(self, draft: _Draft) -> None:
        """Chunks of prompts in what budget is left. Their blocks were reserved at admission."""
        for seq in self.running:
            if draft.budget == 0:
                return
            if seq.num_uncomputed > 1:
                draft.add_chunk(seq, self.config.chunk_size)

    def _secure_blocks(self, seq: Sequence, draft: _Draft) -> bool:
        """Get blocks for all of `seq`'s tokens, preempting the youngest; False if that was `seq`.

        Sequences planned so far are older than `seq`, so a victim is never in the plan.
        """
        missing = self._num_blocks(seq.num_tokens) - len(seq.block_table)
        while not self.pool.can_allocate(missing):
            victim = self.running.last
            self._leave(victim, "preempted")
            draft.preempted.append(victim)
            if victim is seq:
                return False
        if missing > 0:
            seq.block_table.extend(self.pool.allocate(missing, holder_of(seq)))
        return True

    # ------------------------------------------------------------------ admission

    def _admit(self, draft: _Draft) -> None:
        """Admit from the head of the queue until something is short; nobody overtakes the head."""
        while self.waiting and self.num_running < self.config.max_running:
            seq = self.waiting.first
            if draft.budget == 0 and not seq.remote:
                return
            if not self._reserve_blocks(seq):
                return
            self._move(seq, "receiving" if seq.remote else "running")
            draft.admitted.append(seq)
            if not seq.remote:
                draft.add_chunk(seq, self.config.chunk_size)

    def _reserve_blocks(self, seq: Sequence) -> bool:
        """Share the cached prefix and allocate the rest and room for one more token, or do nothing.

        Leaves one block per running sequence free, so that these need not be preempted at once.
        """
        matched = self._match_prefix(seq)
        missing = self._num_blocks(seq.num_tokens + 1) - len(matched)
        if not self.pool.can_allocate(missing + self.pool.num_unheld(matched) + self.num_running):
            return False
        holder = holder_of(seq)
        self.pool.share(matched, holder)
        seq.block_table = matched + self.pool.allocate(missing, holder)
        seq.num_computed = seq.num_cached = len(matched) * self.pool.block_size
        self.pool.record_lookup(seq.num_tokens, seq.num_cached)
        return True

    def _match_prefix(self, seq: Sequence) -> list[int]:
        """Blocks that already have the KV of its first tokens; at least one token stays to compute.

        Prompt logprobs come out of computing the prompt: until they have, nothing is skipped.
        """
        if seq.request.sampling.prompt_logprobs is not None and seq.num_output_tokens == 0:
            return []
        self._extend_hashes(seq)
        most_blocks = (seq.num_tokens - 1) // self.pool.block_size
        return self.pool.match_prefix(seq.block_hashes[:most_blocks])

    # ------------------------------------------------------------------ receiving KV, and the end

    def landed(self, seq: Sequence, num_tokens: int) -> None:
        """Note that a receiving sequence has the KV of its first `num_tokens` tokens in place."""
        self._require_receiving(seq)
        if num_tokens > seq.num_tokens:
            raise ValueError(f"{holder_of(seq)}: KV of {num_tokens} of {seq.num_tokens} tokens")
        start, seq.num_computed = seq.num_computed, max(seq.num_computed, num_tokens)
        # The newest token may be computed here after all (`fall_back`), and a block that others can
        # find is never written again: so the block of the newest token is published by `join`.
        self._publish(seq, start, min(seq.num_computed, seq.num_tokens - 1))

    def join(self, seq: Sequence) -> None:
        """Let a receiving sequence decode: all KV but the newest token's must be in place."""
        self._require_receiving(seq)
        if seq.num_computed < seq.num_tokens - 1:
            raise ValueError(
                f"{holder_of(seq)} cannot join: KV of {seq.num_computed} of {seq.num_tokens} tokens"
            )
        self._start_running(seq)

    def fall_back(self, seq: Sequence) -> None:
        """Let a receiving sequence compute what has not landed itself; it keeps its blocks."""
        self._require_receiving(seq)
        seq.num_computed = min(seq.num_computed, seq.num_tokens - 1)
        self._start_running(seq)

    def _start_running(self, seq: Sequence) -> None:
        seq.remote = False
        self._move(seq, "running")
        self._publish(seq, 0, seq.num_computed)

    def _require_receiving(self, seq: Sequence) -> None:
        if seq.phase != "receiving":
            raise ValueError(f"{holder_of(seq)} is {seq.phase}, not receiving")

    def finish(self, seq: Sequence, reason: FinishReason | None) -> None:
        """End a sequence in whatever phase it is; None: cancelled. Ending it twice changes nothing.

        Gives back its request holds only: what a transfer still holds stays held.
        """
        if seq.phase != "finished":
            self._leave(seq, "finished")
            seq.finish_reason = reason

    # ------------------------------------------------------------------ how it is done

    def _move(self, seq: Sequence, phase: Phase) -> None:
        if seq.phase in self._queues:
            self._queues[seq.phase].discard(seq)
        seq.phase = phase
        if phase in self._queues:
            self._queues[phase].add(seq)

    def _leave(self, seq: Sequence, phase: Phase) -> None:
        self._move(seq, phase)
        self.pool.release(seq.block_table, holder_of(seq))
        seq.block_table = []
        seq.num_computed = 0

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _check_context(self, num_tokens: int) -> None:
        if num_tokens >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {num_tokens} tokens, which leaves no room in the context of "
                f"{self.max_model_len} tokens",
                param="prompt",
                code="context_length_exceeded",
            )

    def _extend_hashes(self, seq: Sequence) -> None:
        salt = seq.request.cache_salt
        extend_hashes(seq.block_hashes, seq.token_ids, self.pool.block_size, salt)

    def _publish(self, seq: Sequence, start: int, end: int) -> None:
        """Make the blocks findable that are full now that tokens [start, end) have their KV."""
        blocks = range(start // self.pool.block_size, end // self.pool.block_size)
        if not blocks or not self.pool.prefix_cache:
            return
        self._extend_hashes(seq)
        for index in blocks:
            parent = seq.block_hashes[index - 1] if index else b""
            self.pool.publish(seq.block_table[index], seq.block_hashes[index], parent)
