"""The streams of a prefill worker: one per decode worker, which carries its prefills, and one per
gateway, which says what becomes of the prefix caches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

import grpc
import grpc.aio
import structlog

from tandem.core.errors import TandemError
from tandem.kvcache.prefix_journal import JournalReader
from tandem.router.lending import prompt_token_seconds
from tandem.transfer import check_kv_spec
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire.prefixes import prefix_events_to_proto
from tandem.worker.event_loop import Outbox
from tandem.worker.liveness import check_incarnation
from tandem.worker.runtime import WorkerRuntime, refuse_stale
from tandem.worker.transfers import PostedEvents, TransferHandler

log = structlog.get_logger(__name__)

SIGN_OF_LIFE_SECONDS = 5.0
"""Those who follow the prefix cache hear something this often, so that neither end takes the stream
for dead, and none pings so much that it is taken for an attack."""


class LegHandler(TransferHandler["DecodePeer"], Protocol):
    """Where a stream's messages and transfers report. Called in the engine thread."""

    def peer_opened(self, peer: DecodePeer) -> None: ...

    def peer_closed(self, peer: DecodePeer) -> None: ...

    def prefill(self, peer: DecodePeer, message: worker_pb2.PrefillRequest) -> None: ...

    def grant(self, peer: DecodePeer, message: worker_pb2.Grant) -> None: ...

    def cancel(self, peer: DecodePeer, message: worker_pb2.CancelPrefill) -> None: ...

    def keep(self, peer: DecodePeer, message: worker_pb2.KeepPrefill) -> None: ...

    def cut(self, peer: DecodePeer, message: worker_pb2.CutPrefill) -> None: ...


class DecodePeer:
    """One decode worker's stream, from hello to its end."""

    def __init__(
        self, hello: worker_pb2.PeerHello, runtime: WorkerRuntime, handler: LegHandler
    ) -> None:
        self.name = f"{hello.name}@{hello.incarnation}"
        self.outbox: Outbox[worker_pb2.PrefillToDecode] = Outbox(runtime.events.loop)
        self.transfer = runtime.links.to_peer(
            self._send_link, PostedEvents(runtime.loop, handler, self)
        )
        self.transfer.meet(hello.name, hello.kv_spec)

    def send(self, message: worker_pb2.PrefillToDecode) -> None:
        """Queue a message for the decode worker; dropped once it is gone."""
        self.outbox.put(message)

    def fail_leg(self, leg_id: int, reason: str) -> None:
        """Say that a leg is over before its time."""
        failed = worker_pb2.PrefillFailed(leg_id=leg_id, reason=reason)
        self.send(worker_pb2.PrefillToDecode(failed=failed))

    def cut_leg(self, leg_id: int, num_tokens: int) -> None:
        """Say that a leg ends here, and how many tokens from the start have KV."""
        cut = worker_pb2.PrefillCut(leg_id=leg_id, num_tokens=num_tokens)
        self.send(worker_pb2.PrefillToDecode(cut=cut))

    def close(self) -> None:
        """End the stream from our side."""
        self.outbox.close()

    def _send_link(self, message: worker_pb2.LinkMessage) -> None:
        self.outbox.put(worker_pb2.PrefillToDecode(link=message))


class PrefillService(worker_pb2_grpc.PrefillServicer):
    """`tandem.v1.Prefill`."""

    def __init__(self, runtime: WorkerRuntime, handler: LegHandler) -> None:
        self._runtime = runtime
        self._handler = handler

    async def Serve(  # noqa: N802 - named by the proto
        self,
        request_iterator: AsyncIterator[worker_pb2.DecodeToPrefill],
        context: grpc.aio.ServicerContext[worker_pb2.DecodeToPrefill, worker_pb2.PrefillToDecode],
    ) -> AsyncIterator[worker_pb2.PrefillToDecode]:
        runtime = self._runtime
        messages = aiter(request_iterator)
        hello = (await anext(messages)).hello
        try:
            check_incarnation(runtime.name, hello.expected_incarnation, runtime.incarnation)
            check_kv_spec(runtime.kv_spec, hello.kv_spec)
        except TandemError as error:
            log.warning(
                "decode worker refused", worker=runtime.name, peer=hello.name, reason=str(error)
            )
            runtime.metrics.stale.inc()
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
        peer = DecodePeer(hello, runtime, self._handler)
        runtime.loop.post(self._handler.peer_opened, peer)
        log.info("decode worker connected", worker=runtime.name, peer=peer.name)
        tasks = [
            asyncio.create_task(self._read(peer, messages)),
            asyncio.create_task(self._beat(peer)),
        ]
        try:
            yield self._hello()
            async for message in peer.outbox:
                yield message
        finally:
            for task in tasks:
                task.cancel()
            peer.close()
            peer.transfer.close()
            runtime.loop.post(self._handler.peer_closed, peer)
            log.info("decode worker gone", worker=runtime.name, peer=peer.name)

    async def FollowPrefixes(  # noqa: N802
        self,
        request: worker_pb2.FollowPrefixesRequest,
        context: grpc.aio.ServicerContext[
            worker_pb2.FollowPrefixesRequest, worker_pb2.PrefixEvents
        ],
    ) -> AsyncIterator[worker_pb2.PrefixEvents]:
        """Read the journal only when the message before was taken: who is slow holds up nothing."""
        runtime, expected = self._runtime, request.expected_incarnation
        await refuse_stale(runtime, expected, context)
        log.info("prefix cache followed", worker=runtime.name, gateway=request.gateway_id)
        reader = JournalReader(runtime.journal)
        pause, quiet = runtime.config.worker.heartbeat_interval, 0.0
        while runtime.incarnation == expected:
            say = quiet >= SIGN_OF_LIFE_SECONDS
            message = await runtime.loop.call(_next_events, runtime, reader, say)
            quiet += pause
            if message is not None:
                quiet = 0.0
                yield message
            await asyncio.sleep(pause)

    def _hello(self) -> worker_pb2.PrefillToDecode:
        runtime = self._runtime
        hello = worker_pb2.PeerHello(
            name=runtime.name, incarnation=runtime.incarnation, kv_spec=runtime.kv_spec
        )
        return worker_pb2.PrefillToDecode(hello=hello)

    async def _read(
        self, peer: DecodePeer, messages: AsyncIterator[worker_pb2.DecodeToPrefill]
    ) -> None:
        """Read until the stream ends or the decode worker is silent too long."""
        timeout = self._runtime.config.worker.peer_timeout
        try:
            while True:
                message = await asyncio.wait_for(anext(messages), timeout)
                self._apply(peer, message)
        except TimeoutError:
            log.warning(
                "decode worker silent", worker=self._runtime.name, peer=peer.name, seconds=timeout
            )
        except StopAsyncIteration:
            pass
        finally:
            peer.close()

    def _apply(self, peer: DecodePeer, message: worker_pb2.DecodeToPrefill) -> None:
        post, handler = self._runtime.loop.post, self._handler
        match message.WhichOneof("kind"):
            case "link":
                peer.transfer.handle(message.link)
            case "prefill":
                self._runtime.trace.stage(message.prefill.request_id, "leg_arrived")
                post(handler.prefill, peer, message.prefill)
            case "grant":
                post(handler.grant, peer, message.grant)
            case "cancel":
                post(handler.cancel, peer, message.cancel)
            case "cut":
                post(handler.cut, peer, message.cut)
            case "keep":
                post(handler.keep, peer, message.keep)
            case "heartbeat":
                pass  # that it came is all it says
            case kind:
                log.warning("unexpected message", peer=peer.name, kind=kind)

    async def _beat(self, peer: DecodePeer) -> None:
        runtime = self._runtime
        while True:
            beat = worker_pb2.PeerHeartbeat(
                iterations=runtime.iterations,
                running=runtime.scheduler.num_running,
                waiting=runtime.scheduler.num_waiting,
            )
            peer.send(worker_pb2.PrefillToDecode(heartbeat=beat))
            await asyncio.sleep(runtime.config.worker.heartbeat_interval)


def _next_events(
    runtime: WorkerRuntime, reader: JournalReader, even_if_empty: bool
) -> worker_pb2.PrefixEvents | None:
    """Engine thread."""
    host_value = runtime.scheduler.preemption.host_value
    events = reader.read(host_value, even_if_empty=even_if_empty)
    if events is None:
        return None
    seconds = prompt_token_seconds(runtime.scheduler)
    return prefix_events_to_proto(replace(events, prompt_token_seconds=seconds))
