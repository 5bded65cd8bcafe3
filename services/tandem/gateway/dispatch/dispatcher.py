"""The dispatcher: puts the parts together and is what the edges see.

Holds no request and takes no decision of its own: membership goes to the pool and the router,
messages of decode workers go to the traffic, each to the method that is named after it.
"""

from __future__ import annotations

import asyncio
import random
import uuid

import grpc.aio
import structlog

from tandem.core.config import GatewayConfig
from tandem.core.errors import UnavailableError
from tandem.core.request import Request
from tandem.gateway.changes import Changes
from tandem.gateway.dispatch.flight import Flight
from tandem.gateway.dispatch.pool import DecodePool
from tandem.gateway.dispatch.prefix_followers import PrefixFollowers
from tandem.gateway.dispatch.routing import Routing
from tandem.gateway.dispatch.stream import DecodeStream, LossCause, StreamTimeouts
from tandem.gateway.dispatch.tokens import TokenStream
from tandem.gateway.dispatch.traffic import Traffic
from tandem.gateway.dispatch.view import ClusterView, Membership
from tandem.gateway.interfaces import DispatchObserver, ModelInfo
from tandem.tracing.buffer import TraceBuffer
from tandem.tracing.service import serve_tracing
from tandem.v1 import worker_pb2
from tandem.wire.prefixes import prefix_events_from_proto

log = structlog.get_logger(__name__)


class Dispatcher:
    """Brings requests to workers and their tokens back, across failures of workers.

    Lives in one event loop: `start` and everything after it run there.
    """

    def __init__(
        self,
        config: GatewayConfig,
        controller_address: str,
        observer: DispatchObserver,
        *,
        gateway_id: str | None = None,
        seed: int | None = None,
        trace: TraceBuffer | None = None,
    ) -> None:
        """`trace` is served at a port of its own, which the controller tells `tandem trace`."""
        self.gateway_id = gateway_id or f"gw-{uuid.uuid4().hex[:8]}"
        self._trace = trace or TraceBuffer(self.gateway_id)
        rng = random.Random(seed)
        timeouts = StreamTimeouts(config.worker_timeout, config.progress_timeout)
        self._observer = observer
        self._pool = DecodePool(self.gateway_id, timeouts, self, rng)
        self._routing = Routing(config.router, self._pool, rng.getrandbits(32))
        self._followers = PrefixFollowers(self.gateway_id, self._routing.observe_prefixes, rng)
        self._traffic = Traffic(config, self._routing, observer, self.gateway_id, self._trace)
        self._view = ClusterView(controller_address, self.gateway_id, self._membership, rng)
        self.changes = Changes()
        self._host = config.host
        self._tracing: grpc.aio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def ready(self) -> bool:
        """Whether the model is known and at least one decode worker takes requests."""
        return not self._closed and self.model is not None and bool(self._pool.accepting)

    @property
    def model(self) -> ModelInfo | None:
        """The served model; None until the first membership arrives."""
        return self._routing.membership.model

    @property
    def in_flight(self) -> int:
        """Requests that have been dispatched and are not over."""
        return len(self._traffic)

    def generate(self, request: Request) -> TokenStream:
        """Return the tokens of a request as they come; it starts when it is first iterated.

        Iterating raises `OverloadedError` when every worker is full, `UnavailableError` when none
        was ready in time, and whatever a worker refused the request with.
        """
        return TokenStream(request, self._open, self._traffic.cancel)

    async def start(self) -> None:
        """Begin to watch the cluster. Returns at once, whether or not the cluster is there."""
        self._tracing, port = await serve_tracing(self._trace, self._host)
        self._watch = asyncio.create_task(self._view.run(port), name="cluster watch")

    async def close(self) -> None:
        """Fail what is in flight and end every stream and connection. Idempotent."""
        self._closed = True
        self.changes.notify()
        self._traffic.fail_all(UnavailableError("the gateway is shutting down"))
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._tracing is not None:
            await self._tracing.stop(grace=None)
        await self._followers.close()
        await self._pool.close()

    # ---- events of the decode streams

    def stream_ready(self, stream: DecodeStream) -> None:
        """A worker takes requests (again)."""
        self._routing.refresh()
        self._traffic.capacity_changed()
        self.changes.notify()

    def stream_message(self, stream: DecodeStream, message: worker_pb2.DecodeMessage) -> None:
        """Pass on what a worker says."""
        match message.WhichOneof("kind"):
            case "outputs":
                self._traffic.outputs(stream, message.outputs)
            case "heartbeat":
                load = message.heartbeat
                self._routing.observe(stream.member.name, load.running, load.waiting)
            case "prefixes":
                self._prefixes(stream, message.prefixes)
            case "need_prefill":
                self._traffic.need_prefill(stream, message.need_prefill)
            case "failed":
                self._traffic.failed(stream, message.failed)

    def stream_stale(self, stream: DecodeStream, incarnation: int) -> None:
        """A message of another incarnation was refused."""
        log.warning("decode stream stale", worker=stream.member.name, incarnation=incarnation)
        self._observer.stale_refused("incarnation")

    def stream_closed(self, stream: DecodeStream, cause: LossCause, detail: str) -> None:
        """Move what the worker had."""
        self._routing.refresh()
        self._traffic.lost(stream, cause, detail)
        self.changes.notify()

    # ---- inside

    def _prefixes(self, stream: DecodeStream, message: worker_pb2.PrefixEvents) -> None:
        """Pass on what a worker has cached; after a gap, ask for all of it again."""
        events = prefix_events_from_proto(message)
        if stream.follows(events.number, reset=events.reset):
            self._routing.observe_prefixes(stream.member, events)

    def _open(self, request: Request) -> Flight:
        if self._closed:
            raise UnavailableError("the gateway is shutting down")
        return self._traffic.open(request)

    def _membership(self, membership: Membership) -> None:
        self._routing.set_membership(membership)
        self._pool.update(membership.decode)
        self._routing.refresh()
        self._followers.update(membership.prefill)
        self.changes.notify()
