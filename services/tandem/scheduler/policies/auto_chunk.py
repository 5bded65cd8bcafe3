"""Auto chunk: chunked prefill whose chunk follows from the measured cost of iterations."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.scheduler.costs import CostEstimator, Work
from tandem.scheduler.policies.base import Policy, Steps, Task, View, prompt_room

MIN_CHUNK = 16
"""A prompt moves on by so much in every iteration, however dear: it must not starve."""


class AutoChunk(Policy):
    """Optimises TTFT under a bound on iterations: chunks as long as they can be while an iteration
    takes at most `auto_chunk_seconds`, or `auto_chunk_ratio` decode steps.

    Costs: it needs some iterations before it knows the machine (until then: `chunk_size`), and at
    `MIN_CHUNK` it breaks the bound rather than let prompts starve. With nobody decoding, nobody is
    stalled, and prompts take the whole budget.

    A ratio is one of decode steps that were measured without prompts beside them: what steps would
    take, seen from iterations that all have prompts of about one length, is anybody's guess, and a
    wrong one would keep all chunks as they are.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._costs = CostEstimator()
        self._step_costs = CostEstimator()
        """Of iterations without prompts."""

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        decoding = view.decoding
        yield Steps(decoding)
        work = Work(decodes=len(decoding), context=sum(seq.num_tokens for seq in decoding))
        prompts = view.prompts
        start = prompts[0].num_computed if prompts else 0
        yield from prompt_room(view, prompts, view.waiting, self._room(view, work, start))

    def measured(self, work: Work, seconds: float) -> None:
        self._costs.measured(work, seconds)
        if not work.prompt_tokens:
            self._step_costs.measured(work, seconds)

    def _room(self, view: View, work: Work, start: int) -> int:
        """Prompt tokens that this iteration can take beside its decode steps."""
        if work.decodes == 0:
            return view.tokens_left
        if not self._costs.trusted:
            return self._config.chunk_size
        longest = self._config.auto_chunk_seconds or self._longest_by_ratio(work)
        return max(
            MIN_CHUNK, self._costs.most_prompt_tokens(work, start, view.tokens_left, longest)
        )

    def _longest_by_ratio(self, work: Work) -> float:
        costs = self._step_costs if self._step_costs.trusted else self._costs
        return self._config.auto_chunk_ratio * costs.seconds(work)
