"""What an iteration costs: the work in it, and an estimate learnt from measured iterations.

Pure: seconds come in as events (`CostEstimator.measured`); nobody here reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from operator import truediv
from typing import NamedTuple

from tandem.core.sequence import ScheduledChunk
from tandem.scheduler.least_squares import LONGEST_RUN, FadingSquares, Run, Terms

_SCALE = (1.0, 64.0, 8.0, 4096.0, 65536.0)
"""Typical sizes of the terms below: dividing by them keeps the estimate well conditioned."""
_CONTEXT_SCALE = _SCALE[3]
_TRUSTED_AFTER = 8
_PROMPT_TERMS = (1, 4)
_LOOSE = 1e-9
"""Ridge of everything else."""
_FIRM = 0.01
"""Ridge of what prompts cost once that was told or learnt: a hundredth of a measurement in which
the term has its typical size. Two small chunks that took long say little of a large one."""


class Work(NamedTuple):
    """The sizes in one iteration that its duration follows from."""

    prompt_tokens: int = 0
    decodes: int = 0
    context: int = 0
    """Tokens whose KV the decodes read, all together."""
    attended: int = 0
    """(token, earlier token) pairs of the prompt chunks: grows with the square of a prompt."""

    def plus_prompt(self, start: int, length: int) -> Work:
        """This work and a chunk of `length` prompt tokens after the first `start` ones."""
        prompt_tokens, decodes, context, attended = self
        more = length * start + length * length // 2
        return Work(prompt_tokens + length, decodes, context, attended + more)

    def after_steps(self, steps: int) -> Work:
        """This work so many decode steps later: each leaves a token of context per sequence."""
        prompt_tokens, decodes, context, attended = self
        return Work(prompt_tokens, decodes, context + steps * decodes, attended)


def work_of(chunks: Iterable[ScheduledChunk]) -> Work:
    """Return the work in an iteration. A chunk of one token counts as a decode step."""
    prompt_tokens = decodes = context = attended = 0
    for chunk in chunks:
        if chunk.length == 1:
            decodes += 1
            context += chunk.start + 1
        else:
            prompt_tokens += chunk.length
            attended += chunk.length * chunk.start + chunk.length * chunk.length // 2
    return Work(prompt_tokens, decodes, context, attended)


class IterationCosts(NamedTuple):
    """Seconds per unit of each term of an iteration's work: what workers tell each other."""

    fixed: float
    prompt_token: float
    decode: float
    context: float
    attended: float

    def seconds(self, work: Work) -> float:
        """Return how long an iteration should take; never negative."""
        fixed, prompt_token, decode, context, attended = self
        return max(
            0.0,
            fixed
            + prompt_token * work.prompt_tokens
            + decode * work.decodes
            + context * work.context
            + attended * work.attended,
        )

    def most_prompt_tokens(self, work: Work, start: int, limit: int, seconds: float) -> int:
        """Return how long a chunk may be so that `work` and it stay within `seconds`; at most
        `limit`, and 0 when not even one token fits."""
        if self.seconds(work.plus_prompt(start, limit)) <= seconds:
            return limit
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(work.plus_prompt(start, middle)) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low


class CostEstimator:
    """Seconds of an iteration as a linear function of its work, by weighted least squares.

    Old iterations are forgotten exponentially, so that the estimate follows a machine that changes.
    A ridge holds the estimate where it was in directions that measurements say little of: a worker
    that only decodes for an hour still knows what a prompt costs. No cost is below 0: more work
    never takes less time, however little was measured.

    Decode steps of one batch are kept as they come, and taken in all together, in closed form, when
    somebody asks: telling is almost free, and a run that is told at once leaves the estimate that
    its steps leave one by one, to the last bit.
    """

    def __init__(self) -> None:
        self._sums = FadingSquares()
        self._count = 0
        self._first = Work()
        self._run: list[float] = []
        """Seconds of iterations that are not in the sums yet. The first of them had the work
        `_first`, each later one a token of context more per sequence."""
        self._next = Work()
        """Of the decode step that would be the next of the run."""
        self._weights: list[float] | None = None
        self._anchor = [0.0] * len(_SCALE)
        self._ridge = [_LOOSE] * len(_SCALE)
        self._knows_prompts = False

    @property
    def knows_prompts(self) -> bool:
        """Whether it has measured a prompt chunk, or was told what one costs."""
        return self._knows_prompts

    @property
    def costs(self) -> IterationCosts:
        """The estimate, to be told to others."""
        return IterationCosts._make(map(truediv, self._solved(), _SCALE))

    def seed(self, costs: IterationCosts) -> None:
        """Believe a like machine's estimate until own measurements say otherwise."""
        if not self._knows_prompts:
            self._knows_prompts = True
            known = self._solved() if self.trusted else None
            told = [cost * scale for cost, scale in zip(costs, _SCALE, strict=True)]
            if known is not None:  # what decoding costs here is known better here
                told[:1], told[2:4] = known[:1], known[2:4]
            self._anchor_at(told)
            self._weights = None

    @property
    def trusted(self) -> bool:
        """Whether enough iterations were measured for `seconds` to mean something."""
        return self._count >= _TRUSTED_AFTER

    def seconds(self, work: Work) -> float:
        """Return how long an iteration should take; never negative."""
        return self.costs.seconds(work)

    def measured(self, work: Work, seconds: float) -> None:
        """Learn from one iteration."""
        self.measured_run(work, (seconds,))

    def measured_run(self, work: Work, seconds: SequenceOf[float]) -> None:
        """Learn from iterations in a row. The first had `work`; if there are more, all are decode
        steps of one batch, each with a token of context more per sequence than the one before."""
        self._knows_prompts = self._knows_prompts or work.prompt_tokens > 0
        if work != self._next:
            self._take_in()
            self._first = self._next = work
        while seconds:
            self._weights = None
            room = LONGEST_RUN - self._count % LONGEST_RUN
            taken, seconds = seconds[:room], seconds[room:]
            self._run += taken
            self._count += len(taken)
            self._next = self._next.after_steps(len(taken))
            if len(taken) == room:
                self._anchor_at(self._solved())  # before too much that it rests on is forgotten

    def most_prompt_tokens(self, work: Work, start: int, limit: int, seconds: float) -> int:
        """As `IterationCosts.most_prompt_tokens`, by the estimate."""
        return self.costs.most_prompt_tokens(work, start, limit, seconds)

    def _solved(self) -> list[float]:
        if self._weights is None:
            self._take_in()
            self._weights = self._sums.solved(self._anchor, self._ridge)
        return self._weights

    def _anchor_at(self, weights: list[float]) -> None:
        """Hold the estimate there; what is known of prompts outweighs a little noise."""
        self._anchor = weights
        for term in _PROMPT_TERMS:
            self._ridge[term] = _FIRM if weights[term] else _LOOSE

    def _take_in(self) -> None:
        """Add the run to the sums, and begin another after it."""
        if self._run:
            growth = self._first.decodes / _CONTEXT_SCALE
            self._sums.add(Run(_terms(self._first), growth, self._run))
            self._first, self._run = self._next, []


def _terms(work: Work) -> Terms:
    fixed, prompt_token, decode, context, attended = _SCALE
    return (
        1 / fixed,
        work.prompt_tokens / prompt_token,
        work.decodes / decode,
        work.context / context,
        work.attended / attended,
    )
