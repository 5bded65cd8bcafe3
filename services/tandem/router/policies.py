"""How one worker is chosen among several. A policy sees candidates and returns one of them.

Ties are broken by the router's own random numbers: several routers that see the same loads must not
all take the same worker.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from random import Random
from typing import NamedTuple, Protocol

import numpy as np

from tandem.core.config import RouterConfig

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
Integers = np.ndarray[tuple[int], np.dtype[np.int64]]


class Candidates(NamedTuple):
    """The workers that may take the request, as columns sorted by name."""

    members: Sequence[str]
    """Names of all workers of the pool, sorted, whether they may take it or not."""
    positions: Integers
    """Where the candidates stand among them, rising."""
    loads: Floats
    """In tokens."""
    cached_tokens: Floats
    """Those in host memory counted by what they save."""


class Policy(Protocol):
    """Chooses the worker of one pool: an index into the candidates, of which there is one at
    least."""

    def choose(self, candidates: Candidates) -> int: ...


class RoundRobin:
    """Each worker in turn, from a random start; those that are excluded lose their turn."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._last: str | None = None

    def choose(self, candidates: Candidates) -> int:
        """Return the candidate whose name is after the last one, in a circle."""
        members, positions = candidates.members, candidates.positions
        if self._last is None:
            index = self._rng.choice(range(len(positions)))
        else:
            following = bisect_right(members, self._last)
            index = int(np.searchsorted(positions, following)) % len(positions)
        self._last = members[positions[index]]
        return index


class LeastLoaded:
    """The worker with the fewest tokens in flight."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def choose(self, candidates: Candidates) -> int:
        """Return the least loaded candidate."""
        return _lowest(candidates.loads, self._rng)


class PrefixAware:
    """The least loaded worker, where a cached prefix makes up for some load.

    The bonus is bounded, so that a system prompt that everybody sends cannot pull all traffic to
    the worker that had it first.
    """

    def __init__(self, rng: Random, weight: float, max_bonus_tokens: int) -> None:
        self._rng = rng
        self._weight = weight
        self._max_bonus_tokens = max_bonus_tokens

    def choose(self, candidates: Candidates) -> int:
        """Return the candidate with the lowest load less bonus."""
        bonus = self._weight * np.minimum(candidates.cached_tokens, self._max_bonus_tokens)
        return _lowest(candidates.loads - bonus, self._rng)


def make_policy(config: RouterConfig, rng: Random) -> Policy:
    """Return a new policy of the configured kind; each pool has one of its own."""
    if config.policy == "round_robin":
        return RoundRobin(rng)
    if config.policy == "least_loaded":
        return LeastLoaded(rng)
    return PrefixAware(rng, config.prefix_weight, config.max_prefix_bonus_tokens)


def _lowest(costs: Floats, rng: Random) -> int:
    return int(rng.choice(np.flatnonzero(costs == costs.min())))
