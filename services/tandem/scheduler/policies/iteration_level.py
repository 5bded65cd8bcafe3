"""Simple iteration-level scheduling: one task for every active sequence, in turn."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.core.sequence import IterationPlan
from tandem.scheduler.policies.base import Policy, Task, View


class IterationLevel(Policy):
    """Optimises evenness: each active sequence gets one task per iteration, a chunk of its prompt
    or a decode step, whichever it needs next.

    Costs: decode steps share the budget with chunks on equal terms, so with many prompts a running
    sequence skips iterations. It never skips more than it takes to go round once:
    ceil(running * chunk_size / max_batch_tokens) iterations.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._chunk_size = config.chunk_size
        self._last: tuple[int, int] | None = None

    def tasks(self, view: View) -> Iterable[Task]:
        running, last = list(view.running), self._last
        if last is not None:
            split = next((i for i, seq in enumerate(running) if seq.order > last), 0)
            running = running[split:] + running[:split]
        for seq in running:
            yield Task(seq, self._chunk_size)
        for seq in view.waiting:
            yield Task(seq, self._chunk_size)

    def planned(self, plan: IterationPlan) -> None:
        if plan.chunks:
            self._last = plan.chunks[-1].sequence.order
