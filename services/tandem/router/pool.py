"""The workers of one role as one router sees them: who they are, how loaded, what they have cached.

Load is in tokens. What this router dispatched is counted at once and exactly; what other routers
dispatched is known only from the workers' reports, which are always a little old.

Invariant: a dispatch is taken back from the very view that it was counted on, so a worker that left
and came back under its name starts from zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tandem.router.policies import Candidate, Policy
from tandem.router.prefix_index import PrefixIndex


@dataclass(slots=True, eq=False)
class WorkerView:
    """One worker. `requests` and `tokens` are this router's own, in flight."""

    name: str
    prefixes: PrefixIndex
    requests: int = 0
    tokens: int = 0
    unreported_tokens: int = 0
    """Dispatched by this router since the worker's last report."""
    others: int = 0
    """Requests of other routers, as of the last report."""
    running: int = 0
    waiting: int = 0


class Dispatch(NamedTuple):
    """Load that was counted on a worker, to be taken back when the request leaves it."""

    worker: WorkerView
    tokens: int


class WorkerPool:
    """The members of one role and the policy that chooses among them."""

    def __init__(self, policy: Policy, block_size: int, max_tracked_blocks: int) -> None:
        self._policy = policy
        self._block_size = block_size
        self._max_tracked_blocks = max_tracked_blocks
        self._workers: dict[str, WorkerView] = {}
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
        self._workers = {
            name: self._workers.get(name) or WorkerView(name, PrefixIndex(self._max_tracked_blocks))
            for name in sorted(set(names))
        }

    def observe(self, worker: WorkerView, running: int, waiting: int) -> None:
        """Take a worker's report: what it has beyond this router's own is other routers'."""
        worker.running, worker.waiting = running, waiting
        worker.others = max(0, running + waiting - worker.requests)
        worker.unreported_tokens = 0

    def choose(
        self, eligible: Collection[WorkerView], hashes: Sequence[bytes], num_tokens: int
    ) -> tuple[WorkerView, int]:
        """Return the worker that the policy takes and how many tokens it should have cached."""
        loads = self._loads(eligible, num_tokens)
        cached = [worker.prefixes.match(hashes) * self._block_size for worker in eligible]
        candidates = {
            worker.name: Candidate(worker.name, load, tokens)
            for worker, load, tokens in zip(eligible, loads, cached, strict=True)
        }
        name = self._policy.choose(list(candidates.values()))
        return self._workers[name], candidates[name].cached_tokens

    def dispatch(self, worker: WorkerView, tokens: int, hashes: Sequence[bytes]) -> Dispatch:
        """Count a request on a worker, now, before anything is sent."""
        worker.requests += 1
        worker.tokens += tokens
        worker.unreported_tokens += tokens
        worker.prefixes.record(hashes)
        self._dispatched_requests += 1
        self._dispatched_tokens += tokens
        return Dispatch(worker, tokens)

    def take_back(self, dispatch: Dispatch) -> None:
        """End the load of a dispatch."""
        worker, tokens = dispatch
        worker.requests -= 1
        worker.tokens -= tokens
        worker.unreported_tokens = min(worker.unreported_tokens, worker.tokens)

    def _loads(self, workers: Iterable[WorkerView], num_tokens: int) -> list[float]:
        """Estimate the tokens in flight on each worker when a request of `num_tokens` is placed.

        Other routers' requests count as the mean of this router's. Between two reports the others
        see what this one sees and do what it does, so what it dispatched since the last report
        stands for their share too: else all of them would fill the one idle worker.
        """
        mean = (self._dispatched_tokens + num_tokens) / (self._dispatched_requests + 1)
        own = sum(worker.requests for worker in self._workers.values())
        others = sum(worker.others for worker in self._workers.values())
        echo = others / max(own, 1)
        return [
            worker.tokens + worker.others * mean + worker.unreported_tokens * echo
            for worker in workers
        ]
