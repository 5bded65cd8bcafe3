"""Continuous batching: the batch is composed anew between any two iterations."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.scheduler.policies.base import Policy, Task, View


class ContinuousBatching(Policy):
    """Optimises throughput with the least machinery: whoever is there computes all that it lacks,
    in order of arrival; sequences join and leave at once (Orca, OSDI 2022).

    Costs: a prompt is not cut except by the budget, so an iteration with a long one is long, and
    every running sequence feels it; behind a prompt that takes the whole budget, younger sequences
    skip the iteration.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._budget = config.max_batch_tokens

    def tasks(self, view: View) -> Iterable[Task]:
        for seq in view.running:
            yield Task(seq, self._budget)
        for seq in view.waiting:
            yield Task(seq, self._budget)
