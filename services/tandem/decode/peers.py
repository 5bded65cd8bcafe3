"""The decode worker's side of its streams to prefill workers: one per incarnation of each.

A peer that is silent for `peer_timeout`, or that stops making progress while it has work, counts as
lost; so does one whose stream ends. Messages go to the engine thread, link messages to `transfer`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Protocol

import grpc.aio
import structlog

from tandem.core.errors import DeadlineExceededError, PeerMismatchError
from tandem.transfer import check_kv_spec
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.worker.event_loop import Outbox
from tandem.worker.liveness import ProgressWatch
from tandem.worker.runtime import WorkerRuntime
from tandem.worker.transfers import PostedEvents, TransferHandler

log = structlog.get_logger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


class PeerHandler(TransferHandler["PrefillPeer"], Protocol):
    """Where a peer's messages and transfers report. Called in the engine thread."""

    def peer_message(self, peer: PrefillPeer, message: worker_pb2.PrefillToDecode) -> None: ...

    def peer_lost(self, peer: PrefillPeer, reason: str) -> None: ...


class PrefillPeer:
    """One incarnation of one prefill worker, from first use until it is lost."""

    def __init__(
        self,
        target: worker_pb2.PrefillTarget,
        runtime: WorkerRuntime,
        handler: PeerHandler,
    ) -> None:
        self.name = target.name
        self.incarnation = target.incarnation
        self.lost = False
        self.load: worker_pb2.WorkerLoad | None = None
        """What it last said of itself. Engine thread."""
        self.progress_at = 0.0
        """When it last said so, or that it had computed a chunk. Engine thread."""
        self._address = target.address
        self._runtime = runtime
        self._handler = handler
        self._outbox: Outbox[worker_pb2.DecodeToPrefill] = Outbox(runtime.events.loop)
        self.transfer = runtime.links.to_peer(
            self._send_link, PostedEvents(runtime.loop, handler, self)
        )
        self._task = runtime.events.spawn(self._run())

    def send(self, message: worker_pb2.DecodeToPrefill) -> None:
        """Queue a message; it leaves once the stream is up, or never if the peer is lost."""
        self._outbox.put(message)

    def close(self) -> None:
        """End the stream from our side."""
        self.lost = True
        self._outbox.close()
        self.transfer.close()
        self._task.cancel()

    def _send_link(self, message: worker_pb2.LinkMessage) -> None:
        self._outbox.put(worker_pb2.DecodeToPrefill(link=message))

    async def _run(self) -> None:
        reason = "the stream ended"
        beat = asyncio.create_task(self._beat())
        try:
            async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                stub: worker_pb2_grpc.PrefillAsyncStub = worker_pb2_grpc.PrefillStub(channel)
                await self._read(stub.Serve(self._messages()))
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except (DeadlineExceededError, PeerMismatchError) as error:
            reason = error.message
        finally:
            beat.cancel()
            self.lost = True
            self._outbox.close()
            self.transfer.close()
            log.warning(
                "prefill worker lost", worker=self._runtime.name, peer=self.name, reason=reason
            )
            self._runtime.loop.post(self._handler.peer_lost, self, reason)

    async def _messages(self) -> AsyncIterator[worker_pb2.DecodeToPrefill]:
        runtime = self._runtime
        hello = worker_pb2.PeerHello(
            name=runtime.name,
            incarnation=runtime.incarnation,
            expected_incarnation=self.incarnation,
            kv_spec=runtime.kv_spec,
        )
        yield worker_pb2.DecodeToPrefill(hello=hello)
        async for message in self._outbox:
            yield message

    async def _read(
        self,
        call: grpc.aio.StreamStreamCall[worker_pb2.DecodeToPrefill, worker_pb2.PrefillToDecode],
    ) -> None:
        config = self._runtime.config.worker
        watch = ProgressWatch(config.progress_timeout)
        while True:
            try:
                message = await asyncio.wait_for(call.read(), config.peer_timeout)
            except TimeoutError:
                call.cancel()
                raise DeadlineExceededError(f"silent for {config.peer_timeout:g} s") from None
            if not isinstance(message, worker_pb2.PrefillToDecode):
                return  # end of stream; the call's status is raised when the channel closes
            match message.WhichOneof("kind"):
                case "link":
                    self.transfer.handle(message.link)
                case "heartbeat":
                    beat = message.heartbeat
                    if watch.observe(
                        beat.iterations, beat.running + beat.waiting > 0, time.monotonic()
                    ):
                        self._runtime.progress += 1
                case "hello":
                    check_kv_spec(self._runtime.kv_spec, message.hello.kv_spec)
                    self.transfer.meet(self.name, message.hello.kv_spec)
                    log.info("prefill worker connected", worker=self._runtime.name, peer=self.name)
                case _:
                    self._runtime.loop.post(self._handler.peer_message, self, message)

    async def _beat(self) -> None:
        runtime = self._runtime
        while True:
            await asyncio.sleep(runtime.config.worker.heartbeat_interval)
            beat = worker_pb2.PeerHeartbeat(
                iterations=runtime.iterations,
                running=runtime.scheduler.num_running,
                waiting=runtime.scheduler.num_waiting,
            )
            self._outbox.put(worker_pb2.DecodeToPrefill(heartbeat=beat))
