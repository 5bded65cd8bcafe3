"""How many prompt tokens an iteration may take so that sequences that decode stay on time.

For a worker that computes prompts with its slack. Whatever the policy wishes, the scheduler grants
no more; the policy still decides which prompts get it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from tandem.core.sequence import Sequence
from tandem.scheduler.costs import CostEstimator, Work

MIN_ROOM = 16
"""A prompt that has begun moves on by so much in every iteration, however dear: none starves."""


class PromptRoom:
    """The bound that ITL objectives put on iterations, by their measured cost."""

    def __init__(self, itl_objective: float, *, heeds_joining: bool) -> None:
        """`heeds_joining`: sequences that receive KV are about to decode here."""
        self._itl_objective = itl_objective
        self._heeds_joining = heeds_joining

    def longest_iteration(self, decoding: SequenceOf[Sequence]) -> float:
        """Return the least ITL objective, in seconds, of the sequences that decode."""
        objectives = (seq.request.itl_objective or self._itl_objective for seq in decoding)
        return min(objectives, default=self._itl_objective)

    def tokens(
        self,
        decoding: SequenceOf[Sequence],
        costs: CostEstimator,
        limit: int,
        *,
        num_receiving: int,
    ) -> int:
        """Return the prompt tokens that fit beside `decoding`; at most `limit`.

        A sequence whose KV is on its way would be stalled like those that decode.
        """
        if not decoding and not (self._heeds_joining and num_receiving):
            return limit
        if not (costs.knows_prompts and costs.trusted):
            return min(MIN_ROOM, limit)
        work = running_work(decoding)
        longest = self.longest_iteration(decoding)
        return max(MIN_ROOM, costs.most_prompt_tokens(work, 0, limit, longest))


def running_work(decoding: SequenceOf[Sequence]) -> Work:
    """Return the work of one decode step of each."""
    return Work(decodes=len(decoding), context=sum(seq.num_tokens for seq in decoding))
