"""Prefill-prioritized: while a prompt can be computed, nothing else is."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.scheduler.policies.base import Policy, Steps, Task, View


class PrefillFirst(Policy):
    """Optimises TTFT and throughput: prompts in iterations of their own, as full as the budget
    allows, so that decoding then runs in larger batches (vLLM's first scheduler).

    Costs: every running sequence stalls while prompts are computed. The stall ends when
    `max_running` sequences run or blocks are short, for then nobody else is admitted: at most
    `max_running` prompts go between two tokens of a sequence.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._budget = config.max_batch_tokens

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        for seq in view.prompts:
            yield Task(seq, self._budget)
        for seq in view.waiting:
            yield Task(seq, self._budget)
        if view.num_planned == 0:
            yield Steps(view.decoding)
