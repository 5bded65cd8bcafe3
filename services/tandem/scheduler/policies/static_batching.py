"""Static batching: a group is formed, runs to the end of its longest member, then the next."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.core.sequence import Sequence
from tandem.scheduler.policies.base import Policy, Steps, Task, View


class StaticBatching(Policy):
    """The baseline that the others are measured against. Nothing is optimised.

    Costs: those that finish early leave their places empty, those that come late wait for the whole
    group, and the first of a group wait `batch_wait` seconds for `batch_size` members. A sequence
    waits for the groups before its own, never for a later one.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._size = config.batch_size
        self._wait = config.batch_wait
        self._budget = config.max_batch_tokens
        self._members: list[Sequence] = []

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        if not view.running and not view.num_receiving:
            self._form(view)
        for seq in view.prompts:
            yield Task(seq, self._budget)
        for seq in self._members:
            if seq.phase == "waiting":
                yield Task(seq, self._budget)
        if view.num_planned == 0:
            yield Steps(view.decoding)

    def _form(self, view: View) -> None:
        """Make the next group of the first that wait, once they are enough or waited enough."""
        self._members = []
        first = list(view.waiting)[: self._size]
        if not first:
            return
        longest = view.now - min(seq.arrived_at for seq in first)
        if len(first) == self._size or longest >= self._wait:
            self._members = first
