"""An iteration while it is composed: what the policy sees of it, and what was granted so far.

Holds no rule: the scheduler decides what enters. Invariant: the chunks never exceed the budget.
"""

from __future__ import annotations

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
        self._running = running
        self._waiting = waiting
        self._receiving = receiving

    # ------------------------------------------------------------------ what a policy sees

    @property
    def num_planned(self) -> int:
        return len(self.chunks)

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        return [  # `Sequence.num_uncomputed`, written out: this is asked for every sequence
            seq
            for seq in self._running
            if len(seq.token_ids) + seq.num_in_flight - seq.num_computed == 1
        ]

    @property
    def prompts(self) -> list[Sequence]:
        return [
            seq
            for seq in self._running
            if len(seq.token_ids) + seq.num_in_flight - seq.num_computed > 1
        ]

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

    def drop_chunk(self, seq: Sequence) -> None:
        """Take a sequence out of the iteration again, if it is in it."""
        chunk = self.chunks.pop(seq, None)
        if chunk is not None:
            self.tokens_left += chunk.length
            if chunk.length > 1:
                self.prompt_tokens -= chunk.length

    def plan(self) -> IterationPlan:
        """Return the iteration as it stands."""
        for seq in self.chunks:
            seq.planned_at = self.now
        return IterationPlan(
            tuple(self.chunks.values()), tuple(self.admitted), tuple(self.preempted)
        )
