"""Runs a gateway: HTTP and gRPC in one event loop, from binding the ports to a graceful stop.

Order matters. Start: ports first, so that a busy one is said at once, then the service. Stop:
readiness goes, the ports close, streams may finish for a bounded time, the service ends last.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn
import uvloop

from tandem.core.config import GatewayConfig, SchedulerConfig
from tandem.core.errors import ConfigError
from tandem.core.pairs import parse_pairs
from tandem.gateway.grpc.server import GrpcEdge
from tandem.gateway.http.app import create_app
from tandem.gateway.interfaces import Dispatcher, MetricsTargets
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.response_cache import ResponseCache
from tandem.gateway.service import InferenceService
from tandem.gateway.tenants import load_tenants
from tandem.tracing.buffer import TraceBuffer

GRACE_SECONDS = 30.0
_BACKLOG = 2048
_log = structlog.get_logger(__name__)


class GatewayServer:
    """One gateway. `run()` is a whole program; `start`, `wait` and `stop` are its parts."""

    def __init__(
        self,
        config: GatewayConfig,
        dispatcher: Dispatcher,
        metrics: GatewayMetrics,
        *,
        targets: MetricsTargets | None = None,
        grace_seconds: float = GRACE_SECONDS,
        own_port: int | None = None,
        scheduler: SchedulerConfig | None = None,
        trace: TraceBuffer | None = None,
    ) -> None:
        """`own_port`: answer there too, alone, where other gateways share the HTTP port.
        `scheduler`: the workers' settings, for the names of its priority classes.
        `trace`: where requests are noted; share it with the dispatcher, which serves it.

        Raises `ConfigError` if the file of API keys cannot be read. Needs a running event loop only
        from `start` on, if the dispatcher does not before.
        """
        self._config = config
        self._grace = grace_seconds
        self._metrics = metrics
        self._targets = targets
        self._own_port = own_port
        self.service = make_service(
            config, dispatcher, metrics, scheduler or SchedulerConfig(), trace
        )
        self._grpc: GrpcEdge | None = None
        self._http: _HttpServer | None = None
        self._http_task: asyncio.Task[None] | None = None
        self._stop_asked: asyncio.Event | None = None
        self.port = 0
        """HTTP port; known after `start`, as is `grpc_port`."""
        self.grpc_port = 0

    async def start(self) -> None:
        """Bind both ports and serve. Raises `ConfigError` if a port is not free."""
        self._stop_asked = asyncio.Event()
        shared = self._config.processes > 1
        listeners = [bind(self._config.host, self._config.port, shared=shared)]
        self.port = listeners[0].getsockname()[1]
        self._grpc = GrpcEdge(self.service, self._config, self._metrics)
        try:
            if self._own_port is not None:
                listeners.append(bind(self._config.host, self._own_port, setting="metrics_port"))
            await self._grpc.start()
        except ConfigError:
            for listener in listeners:
                listener.close()
            raise
        self.grpc_port = self._grpc.port
        await self.service.start()
        self._http = _HttpServer(self._uvicorn_config())
        self._http_task = asyncio.create_task(self._http.serve(listeners), name="http")
        listening = asyncio.create_task(self._http.listening.wait())
        await asyncio.wait((listening, self._http_task), return_when=asyncio.FIRST_COMPLETED)
        if self._http_task.done():
            self._http_task.result()
        _log.info(
            "gateway started", host=self._config.host, port=self.port, grpc_port=self.grpc_port
        )

    def ask_to_stop(self) -> None:
        """Make `wait` return."""
        if self._stop_asked is not None:
            self._stop_asked.set()

    async def wait(self) -> None:
        """Wait until a stop is asked for or the HTTP server ends by itself."""
        assert self._stop_asked is not None
        assert self._http_task is not None
        asked = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait((asked, self._http_task), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()

    async def stop(self) -> None:
        """Stop accepting, let streams finish for `grace_seconds`, then cut them. Idempotent."""
        if self._http is None or self._grpc is None or self._http_task is None:
            return
        _log.info("gateway stopping", grace_seconds=self._grace)
        self._http.should_exit = True
        await asyncio.gather(self._http_task, self._grpc.stop(self._grace))
        await self.service.close()
        self._http = None
        _log.info("gateway stopped")

    async def run_async(self) -> None:
        """Serve until SIGTERM or SIGINT. A second signal cuts the streams at once."""
        loop = asyncio.get_running_loop()
        await self.start()
        gc.freeze()  # what lives as long as the process is not looked at again between tokens
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self.wait()
        finally:
            await self.stop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, in an event loop of its own. Main thread only."""
        uvloop.run(self.run_async())

    def _on_signal(self) -> None:
        assert self._stop_asked is not None
        if self._stop_asked.is_set() and self._http is not None and self._grpc is not None:
            self._http.force_exit = True
            self._grpc.cut()
        self._stop_asked.set()

    def _uvicorn_config(self) -> uvicorn.Config:
        app = create_app(self.service, self._config, self._metrics, self._targets)
        return uvicorn.Config(
            app,
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=round(self._grace),
        )


def make_service(
    config: GatewayConfig,
    dispatcher: Dispatcher,
    metrics: GatewayMetrics,
    scheduler: SchedulerConfig,
    trace: TraceBuffer | None = None,
) -> InferenceService:
    """Return the service that a configuration asks for. Raises `ConfigError` as `load_tenants`."""
    cache = None
    if config.response_cache_bytes:
        cache = ResponseCache(config.response_cache_bytes, config.response_cache_ttl, metrics)
    return InferenceService(
        dispatcher,
        metrics,
        trace,
        cache=cache,
        tenants=load_tenants(config.api_keys_file),
        priority_classes=parse_pairs(scheduler.priority_classes),
    )


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: who runs the gateway decides about signals."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, *, setting: str = "port", shared: bool = False) -> socket.socket:
    """Return a listening socket, which may be one of several on its port.

    Raises `ConfigError` naming the port and its flag.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host: cannot listen on {host!r}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{setting}: cannot listen on {host}:{port} ({error.strerror}); is another server "
            f"running there? Choose another port with --{setting.replace('_', '-')}"
        ) from error
    listener.setblocking(False)
    return listener
