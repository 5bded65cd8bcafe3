"""Decode-prioritized: prompts wait while sequences decode, for a bounded number of iterations."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.core.sequence import IterationPlan
from tandem.scheduler.policies.base import Policy, Steps, Task, View, stall_free


class DecodeFirst(Policy):
    """Optimises inter-token latency: iterations are pure decode steps, as short as they can be.

    Costs: TTFT, and batches that empty before they are filled again. After `decode_streak` pure
    iterations one carries chunks, so a prompt that waits for compute moves on every
    `decode_streak` + 1 iterations. Without anything to decode, prompts are computed at once.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._chunk_size = config.chunk_size
        self._streak_limit = config.decode_streak
        self._streak = 0

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        if not view.decoding or self._streak >= self._streak_limit:
            yield from stall_free(view, view.prompts, view.waiting, self._chunk_size)
            return
        yield Steps(view.decoding)
        for seq in view.waiting:
            if not seq.remote:
                return
            yield Task(seq, 1)  # it takes blocks and no compute

    def planned(self, plan: IterationPlan) -> None:
        pure = all(chunk.length == 1 for chunk in plan.chunks)
        self._streak = self._streak + 1 if pure and plan.chunks else 0
