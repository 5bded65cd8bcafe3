"""Least squares for a linear function of five terms, with measurements that come in runs and fade.

Arithmetic, and nothing else; what the terms are is the caller's business (`costs`). Written out for
speed: every worker adds to its sums and solves them at every decision, and a simulator does so for
a thousand workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

Terms = tuple[float, float, float, float, float]
LONGEST_RUN = 64
_FORGETTING = 0.98
"""What is left of everything after one more measurement."""
_RIDGE = 1e-9


class Run(NamedTuple):
    """Measurements in a row, of which one term grows evenly."""

    terms: Terms
    """Of the first."""
    growth: float
    """Of the fourth term, from each to the next."""
    values: Sequence[float]
    """At most `LONGEST_RUN`."""


class FadingSquares:
    """The sums of the normal equations, old measurements forgotten exponentially."""

    def __init__(self) -> None:
        self._squares = [0.0] * 15
        """Of pairs of terms: the upper half of the matrix, row by row."""
        self._products = [0.0] * 5
        """Of a term and the value."""

    def add(self, run: Run) -> None:
        """Add a run.

        Its terms differ in one place, and evenly: so the sum of their squares is that of as many
        mean ones, and the spread of that term around its mean.
        """
        growth, values = run.growth, run.values
        fading = _FADING[len(values)]
        a, b, c, d, e = run.terms
        d += growth * fading.mean_step
        squares = [a * a, a * b, a * c, a * d, a * e, b * b, b * c, b * d, b * e]  # two rows
        squares += [c * c, c * d, c * e, d * d, d * e, e * e]
        left, total = fading.left, fading.total
        self._squares = [
            left * old + total * new for old, new in zip(self._squares, squares, strict=True)
        ]
        summed = sum(map(mul, fading.weights, values))
        self._products = [
            left * old + summed * new
            for old, new in zip(self._products, (a, b, c, d, e), strict=True)
        ]
        if growth:
            self._squares[12] += growth * growth * fading.spread
            self._products[3] += growth * sum(map(mul, fading.centred, values))

    def solved(self, anchor: Sequence[float]) -> list[float]:
        """Return the coefficients of the terms, pulled a little towards the anchor: they stay there
        as far as the measurements say nothing."""
        upper, size = iter(self._squares), len(anchor)
        rows = [[0.0] * row + [next(upper) for _ in range(row, size)] for row in range(size)]
        for pivot, row in enumerate(rows):
            row[pivot] += _RIDGE
            row.append(self._products[pivot] + _RIDGE * anchor[pivot])
        for pivot, row in enumerate(rows):
            for below in range(pivot + 1, size):
                factor = row[below] / row[pivot]
                if factor:
                    other = rows[below]
                    for column in range(below, size + 1):
                        other[column] -= factor * row[column]
        solution = [0.0] * size
        for index in reversed(range(size)):
            row = rows[index]
            left = row[size]
            for column in range(index + 1, size):
                left -= row[column] * solution[column]
            solution[index] = left / row[index]
        return solution


class _Fading(NamedTuple):
    """What forgetting does to a run, and to what was there before, by the end of the run."""

    left: float
    """Of all before it."""
    weights: tuple[float, ...]
    """Of each of its measurements."""
    total: float
    mean_step: float
    """Of their numbers, from 0 on, by these weights."""
    spread: float
    """Sum of the weighted squares of the distances from the mean step."""
    centred: tuple[float, ...]
    """Each one's weight times its distance from the mean step."""


def _fading(steps: int) -> _Fading:
    weights = tuple(_FORGETTING ** (steps - 1 - step) for step in range(steps))
    total = sum(weights)
    mean = sum(map(mul, weights, range(steps))) / total
    centred = tuple(weight * (step - mean) for step, weight in enumerate(weights))
    spread = sum(part * (step - mean) for step, part in enumerate(centred))
    return _Fading(_FORGETTING**steps, weights, total, mean, spread, centred)


_FADING = {steps: _fading(steps) for steps in range(1, LONGEST_RUN + 1)}
