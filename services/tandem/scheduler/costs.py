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


class CostEstimator:
    """Seconds of an iteration as a linear function of its work, by weighted least squares.

    Old iterations are forgotten exponentially, so that the estimate follows a machine that changes.
    A little ridge decides where measurements do not, as when every batch has the same size.
    """

    def __init__(self) -> None:
        size = len(_SCALE)
        self._squares = [[0.0] * size for _ in range(size)]
        self._products = [0.0] * size
        self._count = 0
        self._weights: list[float] | None = None

    @property
    def trusted(self) -> bool:
        """Whether enough iterations were measured for `seconds` to mean something."""
        return self._count >= _TRUSTED_AFTER

    def seconds(self, work: Work) -> float:
        """Return how long an iteration should take; never negative."""
        if self._weights is None:
            self._weights = _solve(self._squares, self._products)
        weighted = zip(self._weights, _terms(work), strict=True)
        return max(0.0, sum(weight * term for weight, term in weighted))

    def measured(self, work: Work, seconds: float) -> None:
        """Learn from one iteration."""
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


def _terms(work: Work) -> tuple[float, ...]:
    return tuple(value / scale for value, scale in zip((1, *work), _SCALE, strict=True))


def _solve(squares: list[list[float]], products: list[float]) -> list[float]:
    """Solve the normal equations by elimination; the ridge keeps pivots positive."""
    size = len(products)
    rows = [[*row, product] for row, product in zip(squares, products, strict=True)]
    for pivot in range(size):
        rows[pivot][pivot] += _RIDGE
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
