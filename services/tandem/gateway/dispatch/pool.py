"""Keeps one stream open to every decode worker that the cluster lists.

A worker that leaves the list keeps its requests until they are done; one that comes back under a
new incarnation is another worker, and what the old one had moves. A lost worker is tried again with
growing delays for as long as it is listed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

from tandem.gateway.dispatch.connection import Reconnection
from tandem.gateway.dispatch.stream import DecodeStream, StreamEvents, StreamTimeouts
from tandem.gateway.dispatch.view import Member


class DecodePool:
    """All decode streams of this gateway, by worker name."""

    def __init__(
        self, gateway_id: str, timeouts: StreamTimeouts, events: StreamEvents, rng: random.Random
    ) -> None:
        self._gateway_id = gateway_id
        self._timeouts = timeouts
        self._events = events
        self._rng = rng
        self._members: dict[str, Member] = {}
        self._streams: dict[str, DecodeStream] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed: dict[str, asyncio.Event] = {}

    @property
    def accepting(self) -> list[str]:
        """Names of the workers that take new requests now."""
        return [name for name, stream in self._streams.items() if stream.accepting]

    def stream(self, name: str) -> DecodeStream:
        """Return the stream of a worker in `accepting`."""
        return self._streams[name]

    def update(self, members: Mapping[str, Member]) -> None:
        """Take the new list of decode workers."""
        before, self._members = self._members, dict(members)
        for name in before.keys() | members.keys():
            if before.get(name) != members.get(name):
                self._member_changed(name, members.get(name))

    async def close(self) -> None:
        """Close every stream; each is reported as lost."""
        self._members = {}
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _member_changed(self, name: str, member: Member | None) -> None:
        stream = self._streams.get(name)
        if stream is not None and member is None:
            stream.retire(True)
        elif stream is not None and stream.member == member:
            stream.retire(False)
        elif stream is not None:
            stream.close("decode_lost", "another incarnation took its place")
        if name in self._tasks:
            self._changed[name].set()
        elif member is not None:
            self._changed[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(
                self._keep_connected(name), name=f"decode {name}"
            )

    async def _keep_connected(self, name: str) -> None:
        connection = Reconnection(self._rng, "decode stream", worker=name)
        changed = self._changed[name]
        try:
            while (member := self._members.get(name)) is not None:
                changed.clear()
                stream = DecodeStream(
                    member, self._gateway_id, self._timeouts, self._events, connection
                )
                self._streams[name] = stream
                await stream.run()
                await _wait(changed, connection.next_delay())
        finally:
            del self._tasks[name], self._changed[name]
            self._streams.pop(name, None)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
