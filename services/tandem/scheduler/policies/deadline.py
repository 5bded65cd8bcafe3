"""Deadline: least slack first, by each request's own objectives."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.core.sequence import IterationPlan, Sequence
from tandem.scheduler.costs import CostEstimator, Work
from tandem.scheduler.policies.base import Policy, Steps, Task, View, prompt_room

MIN_CHUNK = 16
"""A prompt moves on by so much in every iteration, however dear: it must not starve."""


class Deadline(Policy):
    """Optimises goodput: the prompt with the least slack to its TTFT objective goes first, and
    chunks are cut so that every running sequence gets its next token within its ITL objective.

    Costs: a request that can no longer meet its objective gives way to those that still can. It is
    not dropped: once it has waited `waiting_bound` seconds nobody overtakes it any more.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._costs = CostEstimator()
        self._last_plan = 0.0

    def line(self, waiting: Iterable[Sequence], now: float) -> Iterable[Sequence]:
        return sorted(waiting, key=lambda seq: self._urgency(seq, now))

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        decoding = sorted(view.decoding, key=lambda seq: self._next_token_due(seq, view.now))
        yield Steps(decoding)
        prompts = list(self.line(view.prompts, view.now))
        room = self._room(view, decoding, prompts[0].num_computed if prompts else 0)
        waiting = self.line(view.waiting, view.now)
        yield from prompt_room(view, prompts, waiting, room)

    def planned(self, plan: IterationPlan) -> None:
        if plan.chunks:
            self._last_plan = plan.chunks[0].sequence.planned_at

    def measured(self, work: Work, seconds: float) -> None:
        self._costs.measured(work, seconds)

    def _urgency(self, seq: Sequence, now: float) -> tuple[int, float]:
        """Sort key: overdue by `waiting_bound`, then least slack, then the hopeless."""
        if now - seq.arrived_at >= self._config.waiting_bound:
            return (0, seq.arrived_at)
        if seq.num_output_tokens:  # preempted: its reader is in the middle of a text
            return (1, -self._config.waiting_bound)
        due = seq.arrived_at + (seq.request.ttft_objective or self._config.ttft_objective)
        slack = due - now - self._prefill_seconds(seq)
        return (1, slack) if slack >= 0 else (2, seq.arrived_at)

    def _prefill_seconds(self, seq: Sequence) -> float:
        if not self._costs.trusted:
            return 0.0
        return self._costs.seconds(Work().plus_prompt(seq.num_computed, seq.num_uncomputed))

    def _next_token_due(self, seq: Sequence, now: float) -> float:
        """The token of one that was in the last iteration has just come out."""
        since = seq.planned_at if 0 < seq.planned_at < self._last_plan else now
        return since + (seq.request.itl_objective or self._config.itl_objective)

    def _room(self, view: View, decoding: list[Sequence], start: int) -> int:
        """Prompt tokens that this iteration can take before the first decode step is late."""
        if not decoding:
            return view.tokens_left
        if not self._costs.trusted:
            return self._config.chunk_size
        work = Work(decodes=len(decoding), context=sum(seq.num_tokens for seq in decoding))
        seconds = self._next_token_due(decoding[0], view.now) - view.now
        room = self._costs.most_prompt_tokens(work, start, view.tokens_left, seconds)
        return max(MIN_CHUNK, room)
