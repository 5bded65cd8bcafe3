"""One gRPC stream to one incarnation of one decode worker.

Carries every request that this gateway has there. Says when the stream is ready, hands on each
message of the right incarnation, and says once that it is over and why. What that means for the
requests is not decided here. Invariant: after `stream_closed` nothing more is handed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

import grpc
import structlog

from tandem.gateway.dispatch.connection import Reconnection, describe, open_channel
from tandem.gateway.dispatch.view import Member
from tandem.gateway.dispatch.watchdog import Watchdog
from tandem.v1 import worker_pb2, worker_pb2_grpc

log = structlog.get_logger(__name__)

LossCause = Literal["decode_lost", "decode_frozen"]
ServeCall = grpc.aio.StreamStreamCall[worker_pb2.GatewayMessage, worker_pb2.DecodeMessage]


@dataclass(frozen=True, slots=True)
class StreamTimeouts:
    """When a worker counts as frozen. Seconds."""

    silence: float
    stall: float


class StreamEvents(Protocol):
    """What a stream reports. Called from the event loop; never blocks."""

    def stream_ready(self, stream: DecodeStream) -> None:
        """The worker has said hello: requests may be submitted."""

    def stream_message(self, stream: DecodeStream, message: worker_pb2.DecodeMessage) -> None:
        """A message of the expected incarnation, other than hello."""

    def stream_stale(self, stream: DecodeStream, incarnation: int) -> None:
        """A message of another incarnation was refused; the stream closes next."""

    def stream_closed(self, stream: DecodeStream, cause: LossCause, detail: str) -> None:
        """It is over; every request that it carried must go elsewhere."""


class DecodeStream:
    """::

    connecting --hello--> ready --> closed
         +-------refused or silent----^
    """

    def __init__(
        self,
        member: Member,
        gateway_id: str,
        timeouts: StreamTimeouts,
        events: StreamEvents,
        connection: Reconnection,
    ) -> None:
        """`connection`: to this worker, of which streams before this one were a part."""
        self.member = member
        self.ready = False
        self._connection = connection
        self._gateway_id = gateway_id
        self._events = events
        self._outbox: asyncio.Queue[worker_pb2.GatewayMessage | None] = asyncio.Queue()
        self._closed = False
        self._retired = False
        self._num_requests = 0
        self._iterations = 0
        self._prefix_number = 0
        self._call: ServeCall | None = None
        self._watchdog = Watchdog(timeouts.silence, timeouts.stall, self._frozen)

    @property
    def accepting(self) -> bool:
        """Whether new requests may be sent here."""
        return self.ready and not self._retired

    async def run(self) -> None:
        """Connect and hand on messages until the stream is over. Raises only if cancelled."""
        cause = "the worker ended the stream"
        try:
            async with open_channel(self.member.address) as channel:
                self._call = worker_pb2_grpc.DecodeStub(channel).Serve(self._outgoing())
                async for message in self._call:
                    if self._closed:
                        break
                    self._receive(message)
        except grpc.aio.AioRpcError as error:
            cause = describe(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._closed or (task is not None and task.cancelling()):
                raise  # this task was cancelled, not the call by `close`
        except Exception as error:  # a bug in handling one message moves requests, it loses none
            log.exception("decode stream handler failed", worker=self.member.name)
            cause = f"{type(error).__name__}: {error}"
        finally:
            self.close("decode_lost", cause)

    def send(self, message: worker_pb2.GatewayMessage) -> None:
        """Queue a message for the worker; dropped when the stream is over."""
        if not self._closed:
            self._outbox.put_nowait(message)

    def follows(self, number: int, *, reset: bool) -> bool:
        """Whether prefix events with this number continue those before, or begin anew. If they do
        not, the worker is asked to begin anew, once."""
        if reset or number == self._prefix_number + 1:
            self._prefix_number = number
            return True
        if self._prefix_number >= 0:
            self._prefix_number = -1  # which nothing but a reset follows, as numbers begin at 1
            self.send(worker_pb2.GatewayMessage(resync=worker_pb2.ResyncPrefixes()))
        return False

    def attach(self) -> None:
        """One more request is carried."""
        self._num_requests += 1
        self._watchdog_busy()

    def detach(self) -> None:
        """One request fewer is carried; a retired stream closes with the last."""
        self._num_requests -= 1
        self._watchdog_busy()
        self._close_if_drained()

    def retire(self, retired: bool) -> None:
        """Take no new requests (or take them again); close when those here are done."""
        self._retired = retired
        self._close_if_drained()

    def close(self, cause: LossCause, detail: str) -> None:
        """End the stream now and report it. Idempotent; the first cause counts."""
        if self._closed:
            return
        self._closed = True
        self.ready = False
        self._watchdog.stop()
        self._outbox.put_nowait(None)
        if self._call is not None:
            self._call.cancel()
        self._connection.down(detail)
        self._events.stream_closed(self, cause, detail)

    def _receive(self, message: worker_pb2.DecodeMessage) -> None:
        if message.incarnation != self.member.incarnation:
            self._events.stream_stale(self, message.incarnation)
            self.close("decode_lost", f"answered as incarnation {message.incarnation}")
            return
        self._watchdog.heard()
        kind = message.WhichOneof("kind")
        if kind == "hello":
            self._hello(message.hello.name)
        elif not self.ready:
            self.close("decode_lost", f"{kind} came before hello")
        else:
            self._note_progress(kind, message)
            self._events.stream_message(self, message)

    def _hello(self, name: str) -> None:
        if name != self.member.name:  # a port that another worker has taken over
            self.close("decode_lost", f"answered as {name}")
            return
        self.ready = True
        self._connection.up(incarnation=self.member.incarnation)
        self._events.stream_ready(self)

    def _note_progress(self, kind: str | None, message: worker_pb2.DecodeMessage) -> None:
        if kind == "prefixes":
            return
        if kind != "heartbeat":
            self._watchdog.progressed()
        elif message.heartbeat.iterations != self._iterations:
            self._iterations = message.heartbeat.iterations
            self._watchdog.progressed()

    async def _outgoing(self) -> AsyncIterator[worker_pb2.GatewayMessage]:
        yield worker_pb2.GatewayMessage(
            hello=worker_pb2.GatewayHello(
                gateway_id=self._gateway_id, expected_incarnation=self.member.incarnation
            )
        )
        while (message := await self._outbox.get()) is not None:
            yield message

    def _watchdog_busy(self) -> None:
        if not self._closed and self._num_requests <= 1:
            self._watchdog.set_busy(self._num_requests > 0)

    def _close_if_drained(self) -> None:
        if self._retired and self._num_requests == 0:
            self.close("decode_lost", "left the cluster")

    def _frozen(self, detail: str) -> None:
        self.close("decode_frozen", detail)
