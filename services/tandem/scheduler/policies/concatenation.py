"""Sequence concatenation: several whole prompts in one pass, packed end to end, no padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tandem.core.config import SchedulerConfig
from tandem.core.sequence import Sequence
from tandem.scheduler.policies.base import Policy, Steps, Task, View


class Concatenation(Policy):
    """Optimises prefill throughput: a pass takes as many whole prompts as fit the budget, so short
    ones share the cost of a pass and none is read in twice.

    Costs: an iteration is as long as the budget is large, which running sequences feel. A prompt
    that does not fit beside the others lets shorter ones pass until it is the first prompt of a
    pass: then it is computed, cut if it must be. The first is never overtaken.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._budget = config.max_batch_tokens

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        yield Steps(view.decoding)
        prompts = view.prompts
        yield from self._whole(view, prompts, cut_first=True)
        yield from self._whole(view, view.waiting, cut_first=not prompts)

    def _whole(self, view: View, line: Iterable[Sequence], cut_first: bool) -> Iterator[Task]:
        for place, seq in enumerate(line):
            fits = seq.num_uncomputed <= view.tokens_left
            if fits or seq.remote or (place == 0 and cut_first):
                yield Task(seq, self._budget)
