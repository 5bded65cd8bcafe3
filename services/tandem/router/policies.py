"""How one worker is chosen among several. A policy sees candidates and returns one of them.

Ties are broken by the router's own random numbers: several routers that see the same loads must not
all take the same worker.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, Protocol

import numpy as np

from tandem.core.config import RouterConfig

SLACK = 0.25
"""Share above the mean load from which on queueing for a cached prefix is charged to the prefix."""
MOST_CHARGED = 4096
"""Prefixes whose charges are remembered; the one charged longest ago goes first."""

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
Integers = np.ndarray[tuple[int], np.dtype[np.int64]]


class Candidates(NamedTuple):
    """The workers that may take the request, as columns sorted by name."""

    members: Sequence[str]
    """Names of all workers of the pool, sorted, whether they may take it or not."""
    positions: Integers
    """Where the candidates stand among them, rising."""
    loads: Floats
    """In tokens; of slower workers more, see `pool`."""
    cached_tokens: Floats
    """Those in host memory counted by what they save."""
    fetched_tokens: Floats
    """Those that a worker need not compute even if it has none of them, as it fetches their KV from
    the decode worker; counted by what that saves."""
    weight: Callable[[int], float]
    """What the request would add to the load of a candidate."""
    prefix: Callable[[int], bytes]
    """A name for what a candidate with cached tokens has of the prompt."""


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

    To queue behind a prefix is worth it up to what computing it again costs, for one request. If
    many share it, each of them queues, and one copy on another worker would have spared them all.
    So a request that goes to a crowded worker for its cache, one above (1 + `SLACK`) times the mean
    load plus this request (the capacity of consistent hashing with bounded loads, Mirrokni, Thorup
    and Zadimoghaddam 2016), charges the prefix with the load that it queues behind in excess of
    the least loaded worker's. Once the charges reach what a copy costs, the next request goes
    where its cache does not count, which makes a copy, and the charges begin anew: as in renting
    skis until the rent has come to the price, queueing never costs more than the copies do.
    A conversation that only one request at a time goes on with is a new prefix in each turn.

    A copy costs what has to be computed for it: little where the decode worker has the KV, which
    the worker that gets the copy fetches. It takes room in one more cache all the same, so a worker
    that has the prefix goes first until it is crowded.
    """

    def __init__(self, rng: Random, weight: float, max_bonus_tokens: int) -> None:
        self._rng = rng
        self._weight = weight
        self._max_bonus_tokens = max_bonus_tokens
        self._charges: OrderedDict[bytes, float] = OrderedDict()

    def choose(self, candidates: Candidates) -> int:
        """Return the candidate with the lowest load less bonus."""
        loads = candidates.loads
        bonus = self._weight * np.minimum(candidates.cached_tokens, self._max_bonus_tokens)
        index = _lowest(loads - bonus, self._rng)
        if not bonus[index]:
            return index
        one = candidates.weight(index)
        most = (1.0 + SLACK) * float(loads.sum()) / len(loads) + one
        if loads[index] <= most:
            return index
        fetched = self._weight * np.minimum(candidates.fetched_tokens, self._max_bonus_tokens)
        excess, price = float(loads[index] - loads.min()), float(bonus[index] - fetched[index])
        if not self._is_paid(candidates.prefix(index), excess, price):
            return index
        saved = np.where(loads > most, fetched, np.maximum(bonus, fetched))
        return _lowest(loads - saved, self._rng)

    def _is_paid(self, prefix: bytes, excess: float, price: float) -> bool:
        """Charge a prefix; return whether that pays for a copy."""
        charges = self._charges.pop(prefix, 0.0) + excess
        if charges >= price:
            return True
        self._charges[prefix] = charges
        if len(self._charges) > MOST_CHARGED:
            self._charges.popitem(last=False)
        return False


def make_policy(config: RouterConfig, rng: Random) -> Policy:
    """Return a new policy of the configured kind; each pool has one of its own."""
    if config.policy == "round_robin":
        return RoundRobin(rng)
    if config.policy == "least_loaded":
        return LeastLoaded(rng)
    return PrefixAware(rng, config.prefix_weight, config.max_prefix_bonus_tokens)


def _lowest(costs: Floats, rng: Random) -> int:
    return int(rng.choice(np.flatnonzero(costs == costs.min())))
