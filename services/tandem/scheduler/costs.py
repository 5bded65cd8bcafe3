"""What an iteration costs: the work in it, and an estimate learnt from measured iterations.

Pure: seconds come in as events (`CostEstimator.measured`); nobody here reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tandem.core.sequence import ScheduledChunk

_SCALE = (1.0, 64.0, 8.0, 4096.0, 65536.0)
"""Typical sizes of the terms below: dividing by them keeps the estimate well conditioned."""
_FORGETTING = 0.98
_RIDGE = 1e-9
_TRUSTED_AFTER = 8


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
        return self._replace(
            prompt_tokens=self.prompt_tokens + length,
            attended=self.attended + length * start + length * length // 2,
        )


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
        return max(0.0, sum(cost * size for cost, size in zip(self, (1, *work), strict=True)))

    def most_prompt_tokens(self, work: Work, start: int, limit: int, seconds: float) -> int:
        """Return how long a chunk may be so that `work` and it stay within `seconds`; at most
        `limit`, and 0 when not even one token fits."""
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
    A little ridge holds the estimate where it was in directions that measurements say nothing of:
    a worker that only decodes for an hour still knows what a prompt costs.
    """

    def __init__(self) -> None:
        size = len(_SCALE)
        self._squares = [[0.0] * size for _ in range(size)]
        self._products = [0.0] * size
        self._count = 0
        self._weights: list[float] | None = None
        self._anchor = [0.0] * size
        self._knows_prompts = False

    @property
    def knows_prompts(self) -> bool:
        """Whether it has measured a prompt chunk, or was told what one costs."""
        return self._knows_prompts

    @property
    def costs(self) -> IterationCosts:
        """The estimate, to be told to others."""
        weights = self._solved()
        return IterationCosts(*(w / scale for w, scale in zip(weights, _SCALE, strict=True)))

    def seed(self, costs: IterationCosts) -> None:
        """Believe a like machine's estimate until own measurements say otherwise."""
        if not self._knows_prompts:
            self._knows_prompts = True
            known = self._solved() if self.trusted else None
            self._anchor = [cost * scale for cost, scale in zip(costs, _SCALE, strict=True)]
            if known is not None:  # what decoding costs here is known better here
                self._anchor[:1], self._anchor[2:4] = known[:1], known[2:4]
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
        self._solved()  # the anchor follows the estimate before this measurement dilutes it
        self._knows_prompts = self._knows_prompts or work.prompt_tokens > 0
        terms = _terms(work)
        for row, a in zip(self._squares, terms, strict=True):
            row[:] = [_FORGETTING * old + a * b for old, b in zip(row, terms, strict=True)]
        self._products = [
            _FORGETTING * old + term * seconds
            for old, term in zip(self._products, terms, strict=True)
        ]
        self._count += 1
        self._weights = None

    def most_prompt_tokens(self, work: Work, start: int, limit: int, seconds: float) -> int:
        """As `IterationCosts.most_prompt_tokens`, by the estimate."""
        return self.costs.most_prompt_tokens(work, start, limit, seconds)

    def _solved(self) -> list[float]:
        if self._weights is None:
            self._weights = self._anchor = _solve(self._squares, self._products, self._anchor)
        return self._weights


def _terms(work: Work) -> tuple[float, ...]:
    return tuple(value / scale for value, scale in zip((1, *work), _SCALE, strict=True))


def _solve(squares: list[list[float]], products: list[float], anchor: list[float]) -> list[float]:
    """Solve the normal equations by elimination, pulled a little towards the anchor."""
    size = len(products)
    rows = [[*row, product] for row, product in zip(squares, products, strict=True)]
    for pivot in range(size):
        rows[pivot][pivot] += _RIDGE
        rows[pivot][size] += _RIDGE * anchor[pivot]
    for pivot in range(size):
        for row in range(pivot + 1, size):
            factor = rows[row][pivot] / rows[pivot][pivot]
            for column in range(pivot, size + 1):
                rows[row][column] -= factor * rows[pivot][column]
    weights = [0.0] * size
    for row in reversed(range(size)):
        known = sum(rows[row][column] * weights[column] for column in range(row + 1, size))
        weights[row] = (rows[row][size] - known) / rows[row][row]
    return weights
