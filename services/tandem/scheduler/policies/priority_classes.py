"""Priority classes with ageing: the better class first, but nobody for ever."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.core.pairs import parse_pairs
from tandem.core.sequence import Sequence
from tandem.scheduler.policies.base import Policy, Steps, Task, View, stall_free


class PriorityClasses(Policy):
    """Optimises the latency of better classes: they are served, and keep their blocks, first.

    Costs: the others wait. Each `ageing` seconds of waiting are worth one class, so one that waits
    is overtaken only by those that come at most `ageing` seconds per class of difference later.
    Ageing at one speed for all makes the order a fixed number per sequence: its time of arrival
    plus `ageing` for each class that is better than its own.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._chunk_size = config.chunk_size
        self._ageing = config.ageing
        classes = parse_pairs(config.priority_classes)
        self._names = sorted(classes, key=lambda name: classes[name])
        self._begins = [classes[name] for name in self._names]

    def class_of(self, priority: int) -> str:
        """Return the name of the class that a priority is in; the best takes all below it too."""
        return self._names[self._index(priority)] if self._names else ""

    def line(self, waiting: Iterable[Sequence], now: float) -> Iterable[Sequence]:
        return sorted(waiting, key=self.precedence)

    def precedence(self, seq: Sequence) -> tuple[float, ...]:
        handicap = self._ageing * self._index(seq.request.priority)
        return (seq.arrived_at + handicap, seq.arrival)

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        prompts, waiting = self.line(view.prompts, view.now), self.line(view.waiting, view.now)
        return stall_free(view, prompts, waiting, self._chunk_size)

    def _index(self, priority: int) -> int:
        return max(0, bisect_right(self._begins, priority) - 1)
