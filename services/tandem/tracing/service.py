"""`tandem.v1.Tracing`: the door through which `tandem trace` reaches one process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc.aio

from tandem.tracing.buffer import TraceBuffer
from tandem.tracing.messages import event_to_proto
from tandem.v1 import tracing_pb2, tracing_pb2_grpc

_EVENTS_PER_MESSAGE = 512
"""Keeps each message far below gRPC's limit, and lets streams go on between two."""


class TracingService(tracing_pb2_grpc.TracingServicer):
    """Answers from the event loop; the engine is never asked."""

    def __init__(self, buffer: TraceBuffer) -> None:
        self._buffer = buffer

    async def Record(  # noqa: N802 - named by the proto
        self, request: tracing_pb2.RecordRequest, context: object
    ) -> tracing_pb2.RecordResponse:
        before = self._buffer.recording
        self._buffer.record(request.seconds)
        return tracing_pb2.RecordResponse(
            name=self._buffer.name, was_recording=before, since=self._buffer.since
        )

    async def Collect(  # noqa: N802
        self, request: tracing_pb2.CollectRequest, context: object
    ) -> AsyncIterator[tracing_pb2.TraceEvents]:
        complete_from = self._buffer.complete_from
        events = self._buffer.events(request.since)
        yield tracing_pb2.TraceEvents(complete_from=complete_from)
        for first in range(0, len(events), _EVENTS_PER_MESSAGE):
            some = events[first : first + _EVENTS_PER_MESSAGE]
            yield tracing_pb2.TraceEvents(
                events=map(event_to_proto, some), complete_from=complete_from
            )

    async def Clock(  # noqa: N802
        self, request: tracing_pb2.ClockRequest, context: object
    ) -> tracing_pb2.ClockResponse:
        return tracing_pb2.ClockResponse(now=time.monotonic())


def add_tracing(server: grpc.aio.Server, buffer: TraceBuffer) -> None:
    """Let a server answer for a buffer."""
    tracing_pb2_grpc.add_TracingServicer_to_server(TracingService(buffer), server)


async def serve_tracing(buffer: TraceBuffer, host: str) -> tuple[grpc.aio.Server, int]:
    """Start a server for nothing else on a free port. Returns it and its port."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_tracing(server, buffer)
    port = server.add_insecure_port(f"[{host}]:0" if ":" in host else f"{host}:0")
    await server.start()
    return server, port
