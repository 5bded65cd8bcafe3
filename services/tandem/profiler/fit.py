"""Turns measurements into the terms of a profile. Pure: numbers in, numbers out.

Every measurement is a sum of known sizes times unknown costs, so the costs are a linear least
squares fit, of relative errors (a step of 2 ms counts like a prompt of 2 s) and with no cost below
zero. With this few unknowns the best fit without negative costs is found by trying which are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

import numpy as np

from tandem.core.errors import TandemError
from tandem.scheduler.costs import Work

TERMS = (
    "fixed", "prompt", "prompt_token", "decode", "beyond_knee", "context", "attended", "gateway",
    "rpc",
)  # fmt: skip
"""The unknowns: the fields of `IterationCost`, then seconds per request and per message."""
_CLEARLY = 0.7
"""A knee must leave at most so much of the squared error."""


class FitError(TandemError):
    """The measurements do not determine a profile."""


@dataclass(frozen=True)
class Sample:
    """What took `seconds`: iterations, and messages on the way of a request."""

    seconds: float
    iterations: tuple[Work, ...]
    requests: int = 0
    messages: int = 0

    def sizes(self, knee: int) -> list[float]:
        """Return the size of each of `TERMS` in it; nothing is beyond a knee of 0."""
        total = [sum(column) for column in zip(*self.iterations, strict=True)]
        prompt_tokens, decodes, context, attended = total
        with_prompt = sum(work.prompt_tokens > 0 for work in self.iterations)
        beyond = sum(max(0, work.decodes - knee) for work in self.iterations) if knee else 0
        return [
            len(self.iterations), with_prompt, prompt_tokens, decodes, beyond, context, attended,
            self.requests, self.messages,
        ]  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """Costs by name, and how far the fit is from each sample."""

    costs: Mapping[str, float]
    knee: int
    """Sequences beyond which each costs `beyond_knee` more; 0: nothing does."""
    errors: Sequence[float] = field(default_factory=list)
    """|fitted - measured| / measured."""

    @property
    def error_p50(self) -> float:
        return median(self.errors)

    @property
    def squared_error(self) -> float:
        return sum(error**2 for error in self.errors)

    @property
    def error_max(self) -> float:
        return max(self.errors)

    def seconds(self, sample: Sample) -> float:
        """Return what the fit says that a sample takes."""
        return sum(
            self.costs[name] * size
            for name, size in zip(TERMS, sample.sizes(self.knee), strict=True)
        )


def fit_samples(samples: Sequence[Sample]) -> Fit:
    """Return the costs that fit best. Raises `FitError` if there is nothing to fit.

    A step takes longer by about the same for each sequence up to some number, a knee, and by more
    beyond it: kernels come to the next size, or arithmetic takes longer than memory. It is one of
    the measured batch sizes with others on both sides, if one fits clearly better than none.
    """
    if not samples:
        raise FitError("nothing was measured")
    best = _fit(samples, 0)
    for knee in sorted({work.decodes for s in samples for work in s.iterations} - {0})[1:-1]:
        fit = _fit(samples, knee)
        if fit.squared_error < _CLEARLY * best.squared_error:
            best = fit
    if best.costs["fixed"] <= 0:
        raise FitError("an iteration seems to cost nothing: the measurements are too noisy")
    return best


def _fit(samples: Sequence[Sample], knee: int) -> Fit:
    """Fit with this knee, 0 for none."""
    weights = 1.0 / np.array([sample.seconds for sample in samples])
    sizes = np.array([sample.sizes(knee) for sample in samples], dtype=float) * weights[:, None]
    scale = np.maximum(sizes.max(axis=0), 1e-30)
    solved = _non_negative(sizes / scale)
    costs = dict(zip(TERMS, (solved / scale).tolist(), strict=True))
    errors = np.abs(sizes @ (solved / scale) - 1.0).tolist()
    return Fit(costs, knee, errors)


def fit_link(sizes: Iterable[tuple[int, float, float]]) -> tuple[float, float]:
    """Return bytes per second and seconds per piece from (pieces, bytes, seconds on the wire)."""
    measured = np.array(list(sizes), dtype=float)
    if not len(measured):
        raise FitError("no KV was sent")
    rows, seconds = measured[:, :2], measured[:, 2]
    weighted = rows / seconds[:, None]
    scale = weighted.max(axis=0)
    latency, per_byte = _non_negative(weighted / scale) / scale
    if per_byte <= 0:  # pieces so small that their bytes do not show
        latency, per_byte = 0.0, seconds.sum() / rows[:, 1].sum()
    return 1.0 / float(per_byte), float(latency)


def _non_negative(matrix: np.ndarray) -> np.ndarray:
    """Return x >= 0 with the smallest |matrix @ x - 1|; of equals the one with fewest terms."""
    rows, columns = matrix.shape
    target, best, best_error = np.ones(rows), np.zeros(columns), float(rows)
    used = [column for column in range(columns) if matrix[:, column].any()]
    for count in range(1, len(used) + 1):
        for chosen in combinations(used, count):
            part = matrix[:, chosen]
            solution, _, rank, _ = np.linalg.lstsq(part, target, rcond=1e-9)
            if rank < count or (solution < 0).any():
                continue
            error = float(((part @ solution - target) ** 2).sum())
            if error < best_error * (1 - 1e-9):
                best_error = error
                best = np.zeros(columns)
                best[list(chosen)] = solution
    return best
