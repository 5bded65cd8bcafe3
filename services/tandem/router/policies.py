"""How one worker is chosen among several. A policy sees candidates and returns a name.

Ties are broken by the router's own random numbers: several routers that see the same loads must not
all take the same worker.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, Protocol

from tandem.core.config import RouterConfig


class Candidate(NamedTuple):
    """A worker that may take the request. `load` and `cached_tokens` in tokens."""

    name: str
    load: float
    cached_tokens: int


class Policy(Protocol):
    """Chooses the worker of one pool. Candidates are never empty and are sorted by name."""

    def choose(self, candidates: Sequence[Candidate]) -> str: ...


class RoundRobin:
    """Each worker in turn, from a random start; those that are excluded lose their turn."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._last: str | None = None

    def choose(self, candidates: Sequence[Candidate]) -> str:
        """Return the name after the last one, in a circle."""
        names = [candidate.name for candidate in candidates]
        if self._last is None:
            self._last = self._rng.choice(names)
        else:
            self._last = names[bisect_right(names, self._last) % len(names)]
        return self._last


class LeastLoaded:
    """The worker with the fewest tokens in flight."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Candidate]) -> str:
        """Return the name of the least loaded candidate."""
        return _lowest(candidates, lambda candidate: candidate.load, self._rng)


class PrefixAware:
    """The least loaded worker, where a cached prefix makes up for some load.

    The bonus is bounded, so that a system prompt that everybody sends cannot pull all traffic to
    the worker that had it first.
    """

    def __init__(self, rng: Random, weight: float, max_bonus_tokens: int) -> None:
        self._rng = rng
        self._weight = weight
        self._max_bonus_tokens = max_bonus_tokens

    def choose(self, candidates: Sequence[Candidate]) -> str:
        """Return the name of the candidate with the lowest load less bonus."""
        return _lowest(candidates, self._cost, self._rng)

    def _cost(self, candidate: Candidate) -> float:
        bonus = self._weight * min(candidate.cached_tokens, self._max_bonus_tokens)
        return candidate.load - bonus


def make_policy(config: RouterConfig, rng: Random) -> Policy:
    """Return a new policy of the configured kind; each pool has one of its own."""
    if config.policy == "round_robin":
        return RoundRobin(rng)
    if config.policy == "least_loaded":
        return LeastLoaded(rng)
    return PrefixAware(rng, config.prefix_weight, config.max_prefix_bonus_tokens)


def _lowest(
    candidates: Sequence[Candidate], cost: Callable[[Candidate], float], rng: Random
) -> str:
    costs = [cost(candidate) for candidate in candidates]
    lowest = min(costs)
    best = [c.name for c, value in zip(candidates, costs, strict=True) if value == lowest]
    return rng.choice(best)
