"""An iteration while it is composed: what the policy sees of it, and what was granted so far.

Holds no rule: the scheduler decides what enters. Invariant: the chunks never exceed the budget.
"""

from __future__ import annotations

from collections.abc import Iterator

from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.scheduler.sequence_queue import SequenceQueue


class Draft:
    """The scheduler's side of `policies.View`."""

    def __init__(
        self,
        now: float,
        budget: int,
        running: SequenceQueue,
        waiting: SequenceQueue,
        receiving: SequenceQueue,
    ) -> None:
        self.now = now
        self.tokens_left = budget
        self.admits = True
        """Whether another sequence may leave the queue in this iteration."""
        self.prompt_room: int | None = None
        """Prompt tokens that may compute beside decode steps; None: not asked yet."""
        self.prompt_tokens = 0
        self.chunks: dict[Sequence, ScheduledChunk] = {}
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.may_wait = True
        self.waits = False
        """Whether a sequence is left out for want of a block that is sure to come."""
        self.must_settle = False
        """Whether somebody cannot go on before every iteration under way has ended."""
        self._running = running
        self._waiting = waiting
        self._receiving = receiving
        self._split: tuple[list[Sequence], list[Sequence]] = ([], [])
        self._split_at = -1  # `num_changes` of those that run, when they were split

    # ------------------------------------------------------------------ what a policy sees

    @property
    def num_planned(self) -> int:
        return len(self.chunks)

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        return self._split_running()[0].copy()

    @property
    def prompts(self) -> list[Sequence]:
        return self._split_running()[1].copy()

    @property
    def num_receiving(self) -> int:
        return len(self._receiving)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting) if self.admits else ()

    # ------------------------------------------------------------------ what the scheduler does

    @property
    def is_complete(self) -> bool:
        """Whether no wish could be granted any more, now that no tokens are left."""
        return not (self.admits and self._waiting)

    def add_chunk(self, seq: Sequence, length: int) -> None:
        """Compute the next `length` tokens of a sequence, or as many as the budget allows."""
        if length > self.tokens_left:
            length = self.tokens_left
        self.chunks[seq] = ScheduledChunk(seq, seq.num_computed, length)
        self.tokens_left -= length
        if length > 1:
            self.prompt_tokens += length

    def add_steps(self, sequences: Iterator[Sequence], block_size: int) -> Sequence | None:
        """Compute one token of each of `sequences`, as long as that takes no decision: of those
        that run, lack one token, have a place for it and are not in the iteration yet.

        Returns the first for which it does, or None at the end. `add_chunk`, written out: this is
        what an iteration of many sequences consists of.
        """
        chunks, left = self.chunks, self.tokens_left
        stopped_at: Sequence | None = None
        for seq in sequences:
            start, known, in_flight = seq.num_computed, len(seq.token_ids), seq.num_in_flight
            if (
                known + in_flight - start != 1
                or start >= len(seq.block_table) * block_size
                or not left
                or seq.phase != "running"
                or seq in chunks
            ):
                stopped_at = seq
                break
            chunks[seq] = tuple.__new__(ScheduledChunk, (seq, start, 1, True, in_flight > 0))
            left -= 1
        self.tokens_left = left
        return stopped_at

    def drop_chunk(self, seq: Sequence) -> None:
        """Take a sequence out of the iteration again, if it is in it."""
        chunk = self.chunks.pop(seq, None)
        if chunk is not None:
            self.tokens_left += chunk.length
            if chunk.length > 1:
                self.prompt_tokens -= chunk.length

    def _split_running(self) -> tuple[list[Sequence], list[Sequence]]:
        """Those that lack the KV of one token, and of more. Within an iteration that changes only
        when somebody begins or ceases to run."""
        if self._split_at != self._running.num_changes:
            self._split_at = self._running.num_changes
            self._split = ([], [])
            decoding, prompts = self._split
            for seq in self._running:
                missing = len(seq.token_ids) + seq.num_in_flight - seq.num_computed
                if missing == 1:
                    decoding.append(seq)
                elif missing > 1:
                    prompts.append(seq)
        return self._split

    def plan(self) -> IterationPlan:
        """Return the iteration as it stands."""
        for seq in self.chunks:
            seq.planned_at = self.now
        return IterationPlan(
            tuple(self.chunks.values()), tuple(self.admitted), tuple(self.preempted)
        )
