"""Which sequences of a worker wait, run and receive KV, and how one goes from one to another.

Invariant: a sequence is in the queue of its phase and in no other; `preempted` and `finished` have
none. (One that waits may be withdrawn from its queue for a while.)
"""

from __future__ import annotations

from tandem.core.sequence import Phase, Sequence
from tandem.scheduler.holdings import Holdings
from tandem.scheduler.sequence_queue import SequenceQueue


class Phases:
    """The three queues."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self.waiting = SequenceQueue()
        self.running = SequenceQueue()
        self.receiving = SequenceQueue()
        self._queues: dict[Phase, SequenceQueue] = {
            "waiting": self.waiting,
            "running": self.running,
            "receiving": self.receiving,
        }

    def move(self, seq: Sequence, phase: Phase) -> None:
        """Take a sequence to another phase with all that it holds."""
        if seq.phase in self._queues:
            self._queues[seq.phase].discard(seq)
        seq.phase = phase
        if phase in self._queues:
            self._queues[phase].add(seq)

    def leave(self, seq: Sequence, phase: Phase) -> None:
        """Take a sequence to a phase in which it holds nothing. As long as an iteration under way
        writes its blocks, it keeps them: whoever sees its end releases them."""
        self.move(seq, phase)
        if not seq.num_under_way:
            self._holdings.release(seq)
