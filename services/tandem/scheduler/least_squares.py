"""Least squares for a linear function of five terms, with measurements that come in runs and fade.

Arithmetic, and nothing else; what the terms are is the caller's business (`costs`). Loops are
written out, which is six times as fast: every worker adds to its sums and solves them at every
decision, and a simulator does so for a thousand workers. The five terms are a to e here, `ab` is
the sum of the products of a and b, and `va` that of the values and a.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

Terms = tuple[float, float, float, float, float]
LONGEST_RUN = 64
_FORGETTING = 0.98
"""What is left of everything after one more measurement."""


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
        left, summed = fading.left, sum(map(mul, fading.weights, values))
        a, b, c, d, e = run.terms
        d += growth * fading.mean_step
        self._add_squares(a, b, c, d, e, left, fading.total)
        va, vb, vc, vd, ve = self._products
        vd = left * vd + summed * d
        if growth:
            self._squares[12] += growth * growth * fading.spread
            vd += growth * sum(map(mul, fading.centred, values))
        self._products = [
            left * va + summed * a,
            left * vb + summed * b,
            left * vc + summed * c,
            vd,
            left * ve + summed * e,
        ]

    def _add_squares(
        self, a: float, b: float, c: float, d: float, e: float, left: float, total: float
    ) -> None:
        """Add `total` times the products of these terms to `left` times what is there."""
        aa, ab, ac, ad, ae, bb, bc, bd, be, cc, cd, ce, dd, de, ee = self._squares
        ta, tb, tc, td, te = total * a, total * b, total * c, total * d, total * e
        self._squares = [
            *(left * aa + ta * a, left * ab + ta * b, left * ac + ta * c),
            *(left * ad + ta * d, left * ae + ta * e),
            *(left * bb + tb * b, left * bc + tb * c, left * bd + tb * d, left * be + tb * e),
            *(left * cc + tc * c, left * cd + tc * d, left * ce + tc * e),
            *(left * dd + td * d, left * de + td * e),
            left * ee + te * e,
        ]

    def solved(self, anchor: Sequence[float], ridge: Sequence[float]) -> list[float]:
        """Return the coefficients of the terms, none of them below 0, each pulled towards its
        anchor as if it had been measured there with so much weight as its ridge, which must be
        above 0.

        Gaussian elimination, row by row; no row needs to be exchanged for another, because the
        matrix is symmetric and, with the ridge, positive definite. A coefficient that would be
        negative is 0, and those that come before it are fitted to that.
        """
        aa, ab, ac, ad, ae, bb, bc, bd, be, cc, cd, ce, dd, de, ee = self._squares
        pulls = zip(self._products, anchor, ridge, strict=True)
        a, b, c, d, e = [product + weight * place for product, place, weight in pulls]
        ra, rb, rc, rd, re = ridge
        aa, bb, cc, dd, ee = aa + ra, bb + rb, cc + rc, dd + rd, ee + re
        q, r, s, t = ab / aa, ac / aa, ad / aa, ae / aa
        bb, bc, bd, be, b = bb - q * ab, bc - q * ac, bd - q * ad, be - q * ae, b - q * a
        cc, cd, ce, c = cc - r * ac, cd - r * ad, ce - r * ae, c - r * a
        dd, de, d = dd - s * ad, de - s * ae, d - s * a
        ee, e = ee - t * ae, e - t * a
        r, s, t = bc / bb, bd / bb, be / bb
        cc, cd, ce, c = cc - r * bc, cd - r * bd, ce - r * be, c - r * b
        dd, de, d = dd - s * bd, de - s * be, d - s * b
        ee, e = ee - t * be, e - t * b
        s, t = cd / cc, ce / cc
        dd, de, d = dd - s * cd, de - s * ce, d - s * c
        ee, e = ee - t * ce, e - t * c
        t = de / dd
        e = max(0.0, (e - t * d) / (ee - t * de))
        d = max(0.0, (d - de * e) / dd)
        c = max(0.0, (c - cd * d - ce * e) / cc)
        b = max(0.0, (b - bc * c - bd * d - be * e) / bb)
        a = max(0.0, (a - ab * b - ac * c - ad * d - ae * e) / aa)
        return [a, b, c, d, e]


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
