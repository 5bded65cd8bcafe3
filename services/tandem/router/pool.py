"""The workers of one role as one router sees them: who they are, how loaded, what they have cached.

Load is in tokens. What this router dispatched is counted at once and exactly; what other routers
dispatched is known only from the workers' reports, which are always a little old.

Workers that need longer for a prompt token have more of a load: both their tokens in flight and
the request's own count by what they take there, measured by the worker itself, over the mean of
the pool. A quarter more or less counts as equal: else the one that has measured a little less would
be everybody's first choice.

A decision looks at every worker, as columns of numbers: the loads move together with every dispatch
(`_loads`), so there is no order to keep, and a thousand workers take some microseconds. A column
and its sum change with the worker that they are about; what a decision need not compute, it skips.

Invariant: a dispatch is taken back from the very view that it was counted on, so a worker that left
and came back under its name starts from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import NamedTuple

import numpy as np

from tandem.core.prefix_events import PrefixEvents
from tandem.router.policies import Candidates, Floats, Integers, Policy
from tandem.router.prefix_view import PrefixView

EQUAL = 0.25
"""Workers whose paces differ by about this share at most count as equally fast."""
PACE_CHANGE = 0.05
"""A pace that has changed by less is not news: each is looked at by a pass over all workers."""


@dataclass(slots=True, eq=False)
class WorkerView:
    """One worker. `requests` and `tokens` are this router's own, in flight."""

    name: str
    number: int
    """Its name in the prefix index; given to another one once it has left."""
    position: int = 0
    """Its place among the members, sorted by name, and so in every column."""
    is_member: bool = True
    requests: int = 0
    tokens: int = 0
    unreported_tokens: int = 0
    """Dispatched by this router since the worker's last report."""
    others: int = 0
    """Requests of other routers, as of the last report."""
    running: int = 0
    waiting: int = 0
    prompt_token_seconds: float = 0.0
    """As it has reported; 0: not known."""


Weight = Callable[[int, float], float]
"""Tokens of a request, how many of them a worker has cached -> what it adds to that worker's load.
"""


class Placement(NamedTuple):
    """A request on a worker: load that is counted from `dispatch` to `take_back`."""

    worker: WorkerView
    tokens: int
    cached_tokens: float
    """Of the prompt, on that worker; those in host memory counted by what they save."""


class WorkerPool:
    """The members of one role and the policy that chooses among them."""

    def __init__(
        self, policy: Policy, block_size: int, max_tracked_blocks: int, weight: Weight
    ) -> None:
        self._policy = policy
        self._block_size = block_size
        self._weight = weight
        self._prefixes = PrefixView(max_tracked_blocks)
        self._workers: dict[str, WorkerView] = {}
        self._names: list[str] = []
        self._views: list[WorkerView] = []
        self._set_columns()
        self._dispatched_requests = 0
        self._dispatched_tokens = 0

    @property
    def workers(self) -> Collection[WorkerView]:
        """The members, by name."""
        return self._workers.values()

    def get(self, name: str) -> WorkerView | None:
        """The view of a member."""
        return self._workers.get(name)

    def set_members(self, names: Iterable[str]) -> None:
        """Replace the membership, keeping what is known of those that stay."""
        self._names = sorted(set(names))
        for name in self._workers.keys() - set(self._names):
            self._dismiss(self._workers[name])
        taken = {view.number for view in self._workers.values() if view.is_member}
        free = iter(number for number in range(len(self._names)) if number not in taken)
        self._workers = {
            name: self._workers.get(name) or WorkerView(name, next(free)) for name in self._names
        }
        self._views = list(self._workers.values())
        self._set_columns()

    def observe(self, worker: WorkerView, running: int, waiting: int) -> None:
        """Take a worker's report: what it has beyond this router's own is other routers'."""
        worker.running, worker.waiting = running, waiting
        worker.others = max(0, running + waiting - worker.requests)
        worker.unreported_tokens = 0
        self._note(worker)

    def observe_prefixes(self, worker: WorkerView, events: PrefixEvents) -> None:
        """Take a worker's word on what it can find by prefix, and on its pace."""
        self._prefixes.reported(worker.number, events)
        before, now = worker.prompt_token_seconds, events.prompt_token_seconds
        if now and abs(now - before) > PACE_CHANGE * before:
            worker.prompt_token_seconds = now
            self._paces = _paces([view.prompt_token_seconds for view in self._views])

    def choose(
        self,
        hashes: Sequence[bytes],
        num_tokens: int,
        exclude: Collection[str] = (),
        max_requests: float = float("inf"),
        fetched_tokens: float = 0.0,
    ) -> Placement | None:
        """Return the place that the policy takes among workers that are not excluded and have fewer
        than `max_requests` requests of this router; None if there is none.

        `fetched_tokens`: see `Candidates`.
        """
        may_take = self._requests < max_requests
        for name in exclude:
            if name in self._workers:
                may_take[self._workers[name].position] = False
        positions, loads, cached = self._positions, self._loads(num_tokens), self._nothing
        fetched = self._nothing + fetched_tokens
        if hashes:
            depths = self._prefixes.depths(hashes, self._num_numbers)
            cached = depths[self._numbers] * self._block_size
        if not may_take.all():
            positions = np.flatnonzero(may_take)
            loads, cached, fetched = loads[positions], cached[positions], fetched[positions]
        if not len(positions):
            return None

        def weight(index: int) -> float:
            return self._weight(num_tokens, max(float(cached[index]), fetched_tokens))

        def prefix(index: int) -> bytes:
            return hashes[max(int(cached[index]) // self._block_size, 1) - 1]

        candidates = Candidates(self._names, positions, loads, cached, fetched, weight, prefix)
        if self._paces is not None:
            candidates = _paced(candidates, self._paces[positions], num_tokens)
        index = self._policy.choose(candidates)
        view = self._views[int(positions[index])]
        return Placement(view, int(weight(index)), float(cached[index]))

    def dispatch(self, placement: Placement) -> None:
        """Count a request on a worker, now, before anything is sent."""
        worker, tokens, _ = placement
        worker.requests += 1
        worker.tokens += tokens
        worker.unreported_tokens += tokens
        self._note(worker)
        self._dispatched_requests += 1
        self._dispatched_tokens += tokens

    def take_back(self, placement: Placement) -> None:
        """End the load of a dispatch."""
        worker, tokens, _ = placement
        worker.requests -= 1
        worker.tokens -= tokens
        worker.unreported_tokens = min(worker.unreported_tokens, worker.tokens)
        self._note(worker)

    def expect(self, placement: Placement, hashes: Sequence[bytes]) -> None:
        """Believe that a worker has, or is about to have, these blocks in its cache."""
        if placement.worker.is_member:
            self._prefixes.expected(placement.worker.number, hashes)

    def expect_no_more(self, placement: Placement, hashes: Sequence[bytes]) -> None:
        """Take `expect` back, but for what the worker had when it was chosen."""
        if placement.worker.is_member:
            before = int(placement.cached_tokens) // self._block_size
            self._prefixes.unexpected(placement.worker.number, hashes[before:])

    def _loads(self, num_tokens: int) -> Floats:
        """Estimate the tokens in flight on each worker when a request of `num_tokens` is placed.

        Other routers' requests count as the mean of this router's. Between two reports the others
        see what this one sees and do what it does, so what it dispatched since the last report
        stands for their share too: else all of them would fill the one idle worker.
        """
        mean = (self._dispatched_tokens + num_tokens) / (self._dispatched_requests + 1)
        if not self._sum_others:
            return self._tokens
        echo = self._sum_others / max(self._sum_requests, 1)
        loads: Floats = self._tokens + self._others * mean + self._unreported * echo
        return loads

    def _set_columns(self) -> None:
        """Lay the members' numbers out anew, in the order of their names."""
        size = len(self._views)
        self._positions: Integers = np.arange(size)
        self._numbers: Integers = np.array([view.number for view in self._views], dtype=np.int64)
        self._num_numbers = int(self._numbers.max(initial=-1)) + 1
        self._nothing: Floats = np.zeros(size)
        self._requests, self._tokens, self._unreported, self._others = np.zeros((4, size))
        self._sum_requests = self._sum_others = 0
        self._paces = _paces([view.prompt_token_seconds for view in self._views])
        for position, view in enumerate(self._views):
            view.position = position
            self._note(view)

    def _note(self, view: WorkerView) -> None:
        """Write a member's numbers into its place of the columns."""
        if not view.is_member:
            return
        position = view.position
        self._sum_requests += view.requests - int(self._requests[position])
        self._sum_others += view.others - int(self._others[position])
        self._requests[position] = view.requests
        self._tokens[position] = view.tokens
        self._unreported[position] = view.unreported_tokens
        self._others[position] = view.others

    def _dismiss(self, view: WorkerView) -> None:
        view.is_member = False
        self._prefixes.forget(view.number)


def _paces(seconds: Sequence[float]) -> Floats | None:
    """Return what a token takes each worker over the mean, in powers of 1 + `EQUAL`; who is not
    known is taken for the mean. None: all are equal."""
    known = [each for each in seconds if each]
    if not known:
        return None
    mean = fmean(known)
    steps = [round(log(each / mean) / log(1.0 + EQUAL)) if each else 0 for each in seconds]
    if len(set(steps)) == 1:
        return None
    return np.array([(1.0 + EQUAL) ** step for step in steps])


def _paced(candidates: Candidates, paces: Floats, num_tokens: int) -> Candidates:
    """Weigh loads and caches by what tokens take each candidate, and let the slower ones' loads
    have what the request itself takes longer there."""
    loads = paces * candidates.loads + (paces - paces.min()) * num_tokens
    cached, fetched = candidates.cached_tokens * paces, candidates.fetched_tokens * paces
    return candidates._replace(loads=loads, cached_tokens=cached, fetched_tokens=fetched)
