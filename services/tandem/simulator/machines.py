"""Machines that several workers share: an iteration is longer while a neighbour computes.

And jitter: what the same iteration takes differs from time to time. Which deviation an iteration
gets follows from its worker and number alone, so the same run gives the same times.
"""

from __future__ import annotations

from collections.abc import Sequence

from tandem.scheduler.costs import Work
from tandem.simulator.profile import IterationCost, SharedMachine

_MASK = (1 << 64) - 1
_SHORTEST = 0.1
"""No deviation makes an iteration shorter than this part of its mean."""


class Machine:
    """Counts the workers on it that compute now."""

    def __init__(self) -> None:
        self.num_busy = 0


class WorkerTime:
    """How long iterations of one worker take."""

    def __init__(
        self, cost: IterationCost, shared: SharedMachine, machine: Machine, role: str, seed: int
    ) -> None:
        self._cost = cost
        self._machine = machine
        self._slowdown = shared.slowdown(role) if shared.workers > 1 else 1.0
        self._seed = seed
        self._number = 0

    @property
    def depends_on_others(self) -> bool:
        """Whether an iteration's time depends on who else computes when it begins."""
        return self._slowdown > 1.0

    def begin(self, work: Work) -> float:
        """Return the seconds of the next iteration, which begins now."""
        seconds = self._seconds(work, self._number)
        self._number += 1
        if self._machine.num_busy:
            seconds *= self._slowdown
        self._machine.num_busy += 1
        return seconds

    def end(self) -> None:
        """The iteration has ended."""
        self._machine.num_busy -= 1

    def ahead(self, steps: int, work: Work) -> list[float]:
        """Return the seconds of decode steps that may follow one with `work`, each with a token
        of context more per sequence. Their numbers are taken by `took`."""
        if not self._cost.jitter:
            rest, each = self._cost.seconds(work._replace(context=0)), self._cost.context
            return [
                rest + each * (work.context + step * work.decodes) for step in range(1, steps + 1)
            ]
        seconds = []
        for step in range(steps):
            work = work._replace(context=work.context + work.decodes)
            seconds.append(self._seconds(work, self._number + step))
        return seconds

    def took(self, steps: int) -> None:
        """So many of the steps ahead were taken."""
        self._number += steps

    def _seconds(self, work: Work, number: int) -> float:
        mean, jitter = self._cost.seconds(work), self._cost.jitter
        if not jitter:
            return mean
        return max(mean + _pick(jitter, self._seed, number), _SHORTEST * mean)


def _pick(values: Sequence[float], seed: int, number: int) -> float:
    """One of them, as if at random: the mixing steps of SplitMix64."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return values[(mixed ^ (mixed >> 31)) % len(values)]
