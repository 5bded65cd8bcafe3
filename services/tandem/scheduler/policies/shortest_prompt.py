"""Shortest remaining prompt first, with a bound on waiting."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.core.sequence import Sequence
from tandem.scheduler.policies.base import Policy, Steps, Task, View, stall_free


class ShortestPrompt(Policy):
    """Optimises mean TTFT: the prompt that has the fewest tokens left to compute goes first.

    Costs: the tail. Long prompts wait while short ones come; after `waiting_bound` seconds one is
    overtaken no more, and those past the bound go in order of arrival.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._chunk_size = config.chunk_size
        self._bound = config.waiting_bound

    def line(self, waiting: Iterable[Sequence], now: float) -> Iterable[Sequence]:
        def rank(seq: Sequence) -> tuple[int, float]:
            if now - seq.arrived_at >= self._bound:
                return (0, seq.arrived_at)
            return (1, seq.num_uncomputed)

        return sorted(waiting, key=rank)

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        prompts, waiting = self.line(view.prompts, view.now), self.line(view.waiting, view.now)
        return stall_free(view, prompts, waiting, self._chunk_size)
