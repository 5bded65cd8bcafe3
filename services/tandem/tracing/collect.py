"""Asks every process of a cluster for what it recorded.

Clocks: all processes of one machine share CLOCK_MONOTONIC. Whether two do is measured, not assumed:
of several exchanges the one with the shortest round trip says how far the other clock is from the
middle of it, right within half that round trip. An estimate within its own error of zero is the
same clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import grpc
import grpc.aio

from tandem.core.errors import UnavailableError
from tandem.tracing.buffer import Event
from tandem.tracing.merge import Recording
from tandem.tracing.messages import event_from_proto
from tandem.v1 import tracing_pb2, tracing_pb2_grpc

T = TypeVar("T")

CALL_SECONDS = 5.0
COLLECT_SECONDS = 60.0
_MARGIN_SECONDS = 30.0
"""Recording outlasts the window by this much, so that collecting finds it going on."""
_EXCHANGES = 9


class Target(NamedTuple):
    """A process that serves `Tracing`."""

    name: str
    address: str
    is_gateway: bool = False


class ClockEstimate(NamedTuple):
    """How far another clock is ahead of ours, and the most by which that may be wrong."""

    offset: float
    error: float


@dataclass
class _Peer:
    target: Target
    stub: tracing_pb2_grpc.TracingAsyncStub
    was_recording: bool = False
    since: float = 0.0
    clock: ClockEstimate = field(default_factory=lambda: ClockEstimate(0.0, 0.0))


def estimate_clock(exchanges: Sequence[tuple[float, float, float]]) -> ClockEstimate:
    """Return the offset of a clock from (asked, its answer, answered) triples."""
    asked, theirs, answered = min(exchanges, key=lambda times: times[2] - times[0])
    offset, error = theirs - (asked + answered) / 2, (answered - asked) / 2
    return ClockEstimate(0.0, error) if abs(offset) <= error else ClockEstimate(offset, error)


class Tracer:
    """Processes that record; `recording` makes one."""

    def __init__(self, peers: Sequence[_Peer]) -> None:
        self._peers = peers

    def missing(self, seconds: float) -> float:
        """Seconds until every process has recorded for `seconds`."""
        now = time.monotonic()
        recorded = [now - (peer.since - peer.clock.offset) for peer in self._peers]
        return max(0.0, seconds - min(recorded))

    async def collect(self, since: float) -> list[Recording]:
        """Return what every process has recorded since a time of our clock."""
        return await _gather(self._peers, lambda peer: _collect(peer, since))


@asynccontextmanager
async def recording(targets: Sequence[Target], seconds: float) -> AsyncIterator[Tracer]:
    """Have every process record for at most `seconds` or until the block ends.

    One that had recorded before goes on. Raises `UnavailableError` naming a process that does not
    answer.
    """
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(target.address))
            for target in targets
        ]
        peers = [
            _Peer(target, tracing_pb2_grpc.TracingStub(channel))
            for target, channel in zip(targets, channels, strict=True)
        ]
        try:
            await _gather(peers, lambda peer: _start(peer, seconds))
            yield Tracer(peers)
        finally:
            ours = [peer for peer in peers if not peer.was_recording]
            await asyncio.gather(*(_record(peer, 0.0) for peer in ours), return_exceptions=True)


async def trace(targets: Sequence[Target], seconds: float) -> list[Recording]:
    """Return the last `seconds` of every process.

    Where all have recorded for that long already, at once; else after the time that is missing.
    Raises `UnavailableError` naming a process that does not answer.
    """
    async with recording(targets, seconds + _MARGIN_SECONDS) as tracer:
        await asyncio.sleep(tracer.missing(seconds))
        return await tracer.collect(time.monotonic() - seconds)


async def _gather(peers: Sequence[_Peer], call: Callable[[_Peer], Awaitable[T]]) -> list[T]:
    """Call every peer at once; the error names the one that failed."""

    async def named(peer: _Peer) -> T:
        try:
            return await call(peer)
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(
                f"{peer.target.name} at {peer.target.address} could not be traced: "
                f"{error.code().name}: {error.details()}"
            ) from error

    return await asyncio.gather(*map(named, peers))


async def _start(peer: _Peer, seconds: float) -> None:
    answer = await _record(peer, seconds)
    peer.was_recording, peer.since = answer.was_recording, answer.since
    exchanges = []
    for _ in range(_EXCHANGES):
        asked = time.monotonic()
        theirs = await peer.stub.Clock(tracing_pb2.ClockRequest(), timeout=CALL_SECONDS)
        exchanges.append((asked, theirs.now, time.monotonic()))
    peer.clock = estimate_clock(exchanges)


async def _record(peer: _Peer, seconds: float) -> tracing_pb2.RecordResponse:
    request = tracing_pb2.RecordRequest(seconds=seconds)
    return await peer.stub.Record(request, timeout=CALL_SECONDS)


async def _collect(peer: _Peer, since: float) -> Recording:
    """`since` is on our clock."""
    offset = peer.clock.offset
    request = tracing_pb2.CollectRequest(since=since + offset)
    events: list[Event] = []
    complete_from = 0.0
    async for message in peer.stub.Collect(request, timeout=COLLECT_SECONDS):
        complete_from = message.complete_from
        events.extend(filter(None, map(event_from_proto, message.events)))
    target, error = peer.target, peer.clock.error
    truncated = complete_from > max(request.since, peer.since)
    return Recording(target.name, events, offset, error, truncated, target.is_gateway)
