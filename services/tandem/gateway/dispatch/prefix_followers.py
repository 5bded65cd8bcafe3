"""Follows what prefill workers have in their prefix caches: one stream to each, for the router.

Requests do not go this way, so a stream that is lost costs only time: the router goes on with what
it believes. Invariant: what is handed on is a snapshot and then every change, in order; after a gap
or a loss the worker is subscribed to anew, which begins with a snapshot.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from functools import partial

from tandem.core.prefix_events import PrefixEvents
from tandem.gateway.dispatch.connection import Reconnection, open_channel
from tandem.gateway.dispatch.view import Member
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire.prefixes import prefix_events_from_proto


class PrefixFollowers:
    """A subscription to every prefill worker that the cluster lists, by incarnation."""

    def __init__(
        self,
        gateway_id: str,
        on_events: Callable[[Member, PrefixEvents], None],
        rng: random.Random,
    ) -> None:
        self._gateway_id = gateway_id
        self._on_events = on_events
        self._rng = rng
        self._tasks: dict[Member, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def update(self, members: Mapping[str, Member]) -> None:
        """Take the new list of prefill workers; one under a new incarnation is another worker."""
        wanted = set(members.values())
        for member in self._tasks.keys() - wanted:
            self._end(self._tasks.pop(member))
        for member in wanted - self._tasks.keys():
            name = f"prefixes of {member.name}"
            self._tasks[member] = asyncio.create_task(self._follow(member), name=name)

    async def close(self) -> None:
        """End every subscription."""
        self.update({})
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.cancel()

    async def _follow(self, member: Member) -> None:
        """Subscribe again and again until cancelled."""
        connection = Reconnection(self._rng, "prefix cache", worker=member.name)
        await connection.keep(partial(self._subscribe, member, connection))

    async def _subscribe(self, member: Member, connection: Reconnection) -> str:
        """Hand on events until the stream ends or has a gap; return why it is over."""
        request = worker_pb2.FollowPrefixesRequest(
            gateway_id=self._gateway_id, expected_incarnation=member.incarnation
        )
        last = 0
        async with open_channel(member.address) as channel:
            async for message in worker_pb2_grpc.PrefillStub(channel).FollowPrefixes(request):
                events = prefix_events_from_proto(message)
                if events.number != last + 1 or (not last and not events.reset):
                    return f"message {events.number} came after {last}"
                last = events.number
                connection.up(incarnation=member.incarnation)
                self._on_events(member, events)
        return "the worker ended the stream"
