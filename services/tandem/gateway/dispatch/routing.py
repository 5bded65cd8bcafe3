"""Between the pure router and the living cluster: who can be chosen now, and what a choice means.

The router knows names and load; this knows which names have a stream that accepts requests, which
prefill workers are under suspicion, and the addresses. Invariant: the router is told of exactly the
workers that can take a request, and every load it counts is released once.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NamedTuple

import structlog

from tandem.core.config import RouterConfig
from tandem.core.errors import OverloadedError, UnavailableError
from tandem.core.prefix_events import PrefixEvents
from tandem.gateway.dispatch.flight import Flight
from tandem.gateway.dispatch.pool import DecodePool
from tandem.gateway.dispatch.stream import DecodeStream
from tandem.gateway.dispatch.suspects import Suspects
from tandem.gateway.dispatch.view import Member, Membership
from tandem.router import Assignment, Router
from tandem.v1 import worker_pb2

log = structlog.get_logger(__name__)

SUSPICION_SECONDS = 3.0


class Route(NamedTuple):
    """Where one attempt goes."""

    stream: DecodeStream
    prefill: Member | None


def prefill_target(member: Member | None) -> worker_pb2.PrefillTarget | None:
    """Return the member as a decode worker is told of it."""
    if member is None:
        return None
    return worker_pb2.PrefillTarget(
        name=member.name, address=member.address, incarnation=member.incarnation
    )


class Routing:
    """The router, fed with what is alive."""

    def __init__(self, config: RouterConfig, pool: DecodePool, seed: int) -> None:
        self.membership = Membership()
        self._config = config
        self._pool = pool
        self._seed = seed
        self._router: Router | None = None
        self._block_size = 0
        self._prefix_cache = True
        self._suspects = Suspects(SUSPICION_SECONDS)

    def set_membership(self, membership: Membership) -> None:
        """Take the controller's list; `refresh` follows once the streams have been adapted.

        A worker that came back under its name has an empty cache and no load: the router forgets
        what it knew of the one before. The model stays known while every worker is being replaced.
        """
        if membership.model is None:
            membership = replace(membership, model=self.membership.model)
        self._forget_replaced(membership)
        self.membership = membership
        self._suspects.keep(membership.prefill)
        if self._router is None and membership.model is not None:
            self._block_size = membership.model.block_size
            self._prefix_cache = membership.model.prefix_cache
            self._router = Router(self._config, self._block_size, self._seed)

    def _forget_replaced(self, membership: Membership) -> None:
        if self._router is None:
            return
        old, new = self.membership, membership
        self._router.set_members(
            [name for name, member in new.prefill.items() if old.prefill.get(name) == member],
            [name for name, member in new.decode.items() if old.decode.get(name) == member],
        )

    def refresh(self) -> None:
        """Tell the router who can be chosen now."""
        if self._router is not None:
            self._router.set_members(self.membership.prefill, self._pool.accepting)

    def has_decode_besides(self, names: set[str]) -> bool:
        """Whether a decode worker outside `names` can be chosen now."""
        return not names.issuperset(self._pool.accepting)

    def observe(self, worker: str, running: int, waiting: int) -> None:
        """Pass on what a decode worker says of its load."""
        if self._router is not None and worker in self._pool.accepting:
            self._router.observe(worker, running, waiting)

    def observe_prefixes(self, member: Member, events: PrefixEvents) -> None:
        """Pass on what a worker says of its prefix caches; one that was replaced has no say."""
        name = member.name
        is_prefill = self.membership.prefill.get(name) == member
        if self._router is not None and (is_prefill or name in self._pool.accepting):
            self._router.observe_prefixes(name, events)

    def assign(self, flight: Flight, *, avoid_strictly: bool) -> Route:
        """Choose workers for the next attempt and count their load.

        Decode workers that failed this request are left out while others can take it; if
        `avoid_strictly`, always. Raises `UnavailableError` or `OverloadedError`.
        """
        if self._router is None or not self._pool.accepting:
            raise UnavailableError("no decode worker is ready")
        try:
            assignment = self._route(self._router, flight, flight.avoid)
        except (UnavailableError, OverloadedError):
            if avoid_strictly or not flight.avoid:
                raise
            assignment = self._route(self._router, flight, set())
        prefill = None
        if assignment.prefill is not None:
            prefill = self.membership.prefill[assignment.prefill]
        return Route(self._pool.stream(assignment.decode), prefill)

    def reassign_prefill(self, flight: Flight, failed_worker: str) -> Member | None:
        """Choose another prefill worker for the current attempt; None if none is to be trusted."""
        known = self.membership.prefill.get(failed_worker)
        if known is not None and known == flight.prefill:
            self._suspects.add(known, _now())
            log.warning("prefill suspected", worker=failed_worker, incarnation=known.incarnation)
        if self._router is None:
            return None
        name = self._router.reassign_prefill(flight.wire_id, exclude=self._suspects.current(_now()))
        return None if name is None else self.membership.prefill[name]

    def first_token(self, flight: Flight, *, is_local: bool) -> None:
        """The prefill of the current attempt is done; `is_local`: by its decode worker."""
        if self._router is not None:
            self._router.first_token(flight.wire_id, is_local=is_local)

    def release(self, flight: Flight) -> None:
        """The current attempt is over."""
        if self._router is not None:
            self._router.release(flight.wire_id)

    def _route(self, router: Router, flight: Flight, avoid: set[str]) -> Assignment:
        return router.route(
            flight.wire_id,
            # Without a prefix cache no worker is nearer to a prompt than another.
            flight.hashes(self._block_size) if self._prefix_cache else (),
            len(flight.token_ids),
            exclude=avoid | self._suspects.current(_now()),
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
