"""The gateways' side of a decode worker: one bidirectional stream per gateway.

Turns messages into calls in the engine thread and batches of outputs into messages. Holds no
request state; when a stream ends, its requests are cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import grpc.aio
import structlog

from tandem.core.errors import TandemError
from tandem.core.request import Request
from tandem.kvcache.prefix_journal import JournalReader, PrefixJournal
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import error_to_failed
from tandem.wire.prefixes import prefix_events_to_proto
from tandem.worker.event_loop import Outbox
from tandem.worker.runtime import WorkerRuntime, refuse_stale

log = structlog.get_logger(__name__)


class RequestHandler(Protocol):
    """Where a session's messages go. Called in the engine thread."""

    def session_opened(self, session: GatewaySession) -> None: ...

    def submit(self, session: GatewaySession, message: worker_pb2.Submit) -> None: ...

    def cancel(self, session: GatewaySession, message: worker_pb2.Cancel) -> None: ...

    def reassign(self, session: GatewaySession, message: worker_pb2.Reassign) -> None: ...

    def session_closed(self, session: GatewaySession) -> None: ...


class GatewaySession:
    """One gateway's stream. Outputs collect here and leave as one message per iteration."""

    def __init__(self, gateway_id: str, incarnation: int, outbox: Outbox[worker_pb2.DecodeMessage]):
        self.gateway_id = gateway_id
        self._incarnation = incarnation
        self._outbox = outbox
        self._prefixes: JournalReader | None = None
        self._pending: list[worker_pb2.SequenceOutput] = []

    def emit(self, output: worker_pb2.SequenceOutput) -> None:
        """Add an output to the batch of this iteration. Engine thread."""
        self._pending.append(output)

    def flush(self, iteration: int) -> None:
        """Send what has collected. Engine thread."""
        if self._pending:
            batch = worker_pb2.OutputBatch(iteration=iteration, outputs=self._pending)
            self._pending = []
            self._send(worker_pb2.DecodeMessage(outputs=batch))

    def fail(self, error: TandemError, request_id: str, attempt: int) -> None:
        """Say why a request is over, and that it failed. Engine thread."""
        failed = error_to_failed(error, request_id, attempt)
        self._send(worker_pb2.DecodeMessage(failed=failed))

    def need_prefill(self, request: Request, failed_worker: str, reason: str) -> None:
        """Ask for another prefill worker. Engine thread."""
        need = worker_pb2.NeedPrefill(
            request_id=request.request_id,
            attempt=request.attempt,
            failed_worker=failed_worker,
            reason=reason,
        )
        self._send(worker_pb2.DecodeMessage(need_prefill=need))

    def heartbeat(self, message: worker_pb2.Heartbeat) -> None:
        self._send(worker_pb2.DecodeMessage(heartbeat=message))

    def report_prefixes(self, journal: PrefixJournal, host_value: float) -> None:
        """Say what became of this worker's cached prefixes since the last call. Engine thread."""
        if self._prefixes is None:
            self._prefixes = JournalReader(journal)
        events = self._prefixes.read(host_value)
        if events is not None:
            self._send(worker_pb2.DecodeMessage(prefixes=prefix_events_to_proto(events)))

    def resync_prefixes(self) -> None:
        """The gateway has lost its place: begin again. Engine thread."""
        if self._prefixes is not None:
            self._prefixes.restart()

    def close(self) -> None:
        """End the stream, as when this incarnation is burnt."""
        self._outbox.close()

    def _send(self, message: worker_pb2.DecodeMessage) -> None:
        message.incarnation = self._incarnation
        self._outbox.put(message)


class DecodeService(worker_pb2_grpc.DecodeServicer):
    """`tandem.v1.Decode`."""

    def __init__(self, runtime: WorkerRuntime, handler: RequestHandler) -> None:
        self._runtime = runtime
        self._handler = handler

    async def Serve(  # noqa: N802 - named by the proto
        self,
        request_iterator: AsyncIterator[worker_pb2.GatewayMessage],
        context: grpc.aio.ServicerContext[worker_pb2.GatewayMessage, worker_pb2.DecodeMessage],
    ) -> AsyncIterator[worker_pb2.DecodeMessage]:
        messages = aiter(request_iterator)
        hello = (await anext(messages)).hello
        runtime = self._runtime
        await refuse_stale(runtime, hello.expected_incarnation, context)
        outbox: Outbox[worker_pb2.DecodeMessage] = Outbox(asyncio.get_running_loop())
        session = GatewaySession(hello.gateway_id, runtime.incarnation, outbox)
        runtime.loop.post(self._handler.session_opened, session)
        log.info("gateway connected", worker=runtime.name, gateway=hello.gateway_id)
        tasks = [
            asyncio.create_task(self._read(session, messages, outbox)),
            asyncio.create_task(self._beat(session)),
        ]
        try:
            yield worker_pb2.DecodeMessage(
                incarnation=runtime.incarnation, hello=worker_pb2.DecodeHello(name=runtime.name)
            )
            async for message in outbox:
                yield message
        finally:
            for task in tasks:
                task.cancel()
            outbox.close()
            runtime.loop.post(self._handler.session_closed, session)
            log.info("gateway gone", worker=runtime.name, gateway=hello.gateway_id)

    async def _read(
        self,
        session: GatewaySession,
        messages: AsyncIterator[worker_pb2.GatewayMessage],
        outbox: Outbox[worker_pb2.DecodeMessage],
    ) -> None:
        post, handler = self._runtime.loop.post, self._handler
        try:
            async for message in messages:
                match message.WhichOneof("kind"):
                    case "submit":
                        self._runtime.trace.stage(message.submit.request_id, "arrived")
                        post(handler.submit, session, message.submit)
                    case "cancel":
                        post(handler.cancel, session, message.cancel)
                    case "reassign":
                        post(handler.reassign, session, message.reassign)
                    case "resync":
                        post(session.resync_prefixes)
                    case kind:
                        log.warning("unexpected message", gateway=session.gateway_id, kind=kind)
        finally:
            outbox.close()

    async def _beat(self, session: GatewaySession) -> None:
        runtime = self._runtime
        while True:
            session.heartbeat(
                worker_pb2.Heartbeat(
                    iterations=runtime.progress,
                    running=runtime.scheduler.num_running,
                    waiting=runtime.scheduler.num_waiting,
                    blocks_used=runtime.pool.num_used,
                    blocks_total=runtime.pool.num_blocks,
                )
            )
            await asyncio.sleep(runtime.config.worker.heartbeat_interval)
