"""The router: a prefill worker and a decode worker for each request, and what each has to do.

Pure: it is told of members, reports and ends of requests, and answers at once. It sends nothing,
waits for nothing and reads no clock. One router per gateway; several need not know of each other.

Invariant: a request counts as load from the moment it is routed until `release`, exactly once per
worker, so a burst that no worker has answered yet is already spread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from tandem.core.config import RouterConfig
from tandem.core.errors import OverloadedError, UnavailableError
from tandem.core.prefix_events import PrefixEvents
from tandem.router.policies import make_policy
from tandem.router.pool import Placement, WorkerPool, WorkerView
from tandem.router.prefix_view import keys_of

EXPECTED_OUTPUT_TOKENS = 256
"""What a request weighs on a decode worker beside its prompt: about the mean output of a chat."""
FETCH_COST = 0.1
"""What a token counts whose KV is fetched rather than computed. For 8 billion parameters, 131 kB at
40 GB/s take 3.3 µs, computing it on an accelerator at half of 989 TFLOP/s 32.5 µs."""
MAX_RETRY_AFTER = 30.0


class Assignment(NamedTuple):
    """Who serves a request. `prefill` None: the decode worker prefills itself."""

    prefill: str | None
    decode: str


@dataclass(slots=True)
class _InFlight:
    hashes: Sequence[bytes]
    num_tokens: int
    decode: Placement
    prefill: Placement | None = None


class Router:
    """Assigns requests from this gateway's view of the cluster."""

    def __init__(self, config: RouterConfig, block_size: int, seed: int) -> None:
        rng = Random(seed)
        self._config = config
        self._block_size = block_size
        blocks = config.max_tracked_blocks

        def prefill_weight(num_tokens: int, cached_tokens: float) -> float:
            return max(num_tokens - cached_tokens, block_size)

        self._prefill = WorkerPool(make_policy(config, rng), block_size, blocks, prefill_weight)
        self._decode = WorkerPool(make_policy(config, rng), block_size, blocks, _decode_weight)
        self._in_flight: dict[str, _InFlight] = {}

    # ------------------------------------------------------------------ what it is told

    def set_members(self, prefill: Iterable[str], decode: Iterable[str]) -> None:
        """Replace the membership, keeping what is known of the workers that stay."""
        self._prefill.set_members(prefill)
        self._decode.set_members(decode)

    def observe(self, worker: str, running: int, waiting: int) -> None:
        """Take a worker's report of its requests; one of a worker that is no member is ignored."""
        for pool in (self._prefill, self._decode):
            view = pool.get(worker)
            if view is not None:
                pool.observe(view, running, waiting)

    def observe_prefixes(self, worker: str, events: PrefixEvents) -> None:
        """Take a worker's report of its prefix caches; one of no member is ignored."""
        for pool in (self._prefill, self._decode):
            view = pool.get(worker)
            if view is not None:
                pool.observe_prefixes(view, events)

    def first_token(self, request_id: str, *, is_local: bool = False) -> None:
        """The prompt is done: its prefill worker is rid of it, its decode worker has all of it.

        `is_local`: the decode worker computed it, so the prefill worker has nothing of it.
        """
        request = self._in_flight.get(request_id)
        if request is None:
            return
        self._decode.expect(request.decode, request.hashes)
        if is_local and request.prefill is not None:
            self._prefill.expect_no_more(request.prefill, request.hashes)
        self._end_prefill(request)

    def release(self, request_id: str) -> None:
        """The request has ended or leaves its workers. Releasing it again changes nothing."""
        request = self._in_flight.pop(request_id, None)
        if request is not None:
            self._end_prefill(request)
            self._decode.take_back(request.decode)

    def in_flight(self, worker: str) -> int:
        """Requests that this router has on a worker now."""
        views = (pool.get(worker) for pool in (self._prefill, self._decode))
        return sum(view.requests for view in views if view is not None)

    # ------------------------------------------------------------------ what it decides

    def route(
        self,
        request_id: str,
        hashes: Sequence[bytes],
        num_tokens: int,
        exclude: Collection[str] = (),
    ) -> Assignment:
        """Assign both workers and count the load. A request routed again leaves its old ones first.

        `hashes`: of the full blocks of its `num_tokens` tokens. Raises `OverloadedError` when every
        decode worker that may serve it is full, `UnavailableError` when there is none.
        """
        self.release(request_id)
        hashes = keys_of(hashes)
        decode = self._choose_decode(hashes, num_tokens, exclude)
        self._decode.dispatch(decode)
        request = self._in_flight[request_id] = _InFlight(hashes, num_tokens, decode)
        prefill = self._dispatch_prefill(request, exclude)
        return Assignment(prefill.worker.name if prefill else None, decode.worker.name)

    def reassign_prefill(self, request_id: str, exclude: Collection[str]) -> str | None:
        """Name another prefill worker for a request in flight, and move its load there.

        None: there is no other, or the request is not in flight here any more.
        """
        request = self._in_flight.get(request_id)
        if request is None:
            return None
        self._end_prefill(request)
        placement = self._dispatch_prefill(request, exclude)
        return placement.worker.name if placement else None

    def _dispatch_prefill(self, request: _InFlight, exclude: Collection[str]) -> Placement | None:
        """Choose a prefill worker and count the tokens that it will have to compute.

        It computes none that the decode worker has.
        """
        hashes, fetched = request.hashes, (1.0 - FETCH_COST) * request.decode.cached_tokens
        placement = self._prefill.choose(
            hashes, request.num_tokens, exclude, fetched_tokens=fetched
        )
        if placement is not None:
            self._prefill.dispatch(placement)
            self._prefill.expect(placement, hashes)
        request.prefill = placement
        return placement

    def _end_prefill(self, request: _InFlight) -> None:
        if request.prefill is not None:
            self._prefill.take_back(request.prefill)
            request.prefill = None

    def _choose_decode(
        self, hashes: Sequence[bytes], num_tokens: int, exclude: Collection[str]
    ) -> Placement:
        """Choose among the decode workers that can take one more request of this router."""
        limit = self._config.max_in_flight
        placement = self._decode.choose(hashes, num_tokens, exclude, limit)
        if placement is not None:
            return placement
        members = [view for view in self._decode.workers if view.name not in exclude]
        if not members:
            raise UnavailableError("no decode worker is available")
        raise OverloadedError(
            f"every decode worker has {limit} requests in flight",
            retry_after=min(_seconds_to_drain(view) for view in members),
        )


def _decode_weight(num_tokens: int, cached_tokens: float) -> float:
    return num_tokens + EXPECTED_OUTPUT_TOKENS


def _seconds_to_drain(worker: WorkerView) -> float:
    """A hint that grows with the queue: a second for each full batch that waits, and one more."""
    return min(1.0 + worker.waiting / max(worker.running, 1), MAX_RETRY_AFTER)
