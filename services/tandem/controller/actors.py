"""The kinds of Ray actor: around each worker program, its further ranks, and the manager.

All are async actors: their event loop answers while the work goes on in threads. Ray is handed
these classes by `launcher` and `session`; nothing here calls Ray except to learn where it runs.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import structlog

from tandem.controller.logs import configure_logging
from tandem.controller.platform import StartFailure
from tandem.controller.roster import Endpoint, Role
from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError, ModelLoadError, TandemError
from tandem.worker.garbage import spare_what_is_here

if TYPE_CHECKING:
    from tandem.worker.ranks import RankAddress

log = structlog.get_logger(__name__)

WORKER_CLASSES: Mapping[Role, str] = {
    "prefill": "tandem.prefill.worker:PrefillWorker",
    "decode": "tandem.decode.worker:DecodeWorker",
}


class Worker(Protocol):
    """What a worker program offers to its actor."""

    @property
    def rank_address(self) -> RankAddress | None:
        """Where its other ranks join, from the start on; None if it has only one."""

    def start(self) -> Any:
        """Load, warm up and serve; returns address, metrics_address, incarnation and pid."""

    def stop(self) -> None:
        """Drop what is in flight and end every thread."""


class WorkerActor:
    """Holds one worker program. The process is the unit that is killed and replaced."""

    def __init__(
        self, name: str, class_path: str, config: TandemConfig, device: str, *, several_nodes: bool
    ) -> None:
        configure_logging(config.log_level)
        self._name = name
        self._class_path = class_path
        self._config = on_this_node(config, several_nodes=several_nodes)
        self._device = device
        self._worker: Worker | None = None
        self._progress = "process up"
        self._started: asyncio.Task[Endpoint | StartFailure] | None = None
        self._made: asyncio.Task[Worker] | None = None

    def __repr__(self) -> str:
        return self._name

    async def start(self) -> Endpoint | StartFailure:
        """Start the worker program once; a later call reports the same outcome."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        return await asyncio.shield(self._started)

    async def rank_address(self) -> RankAddress | None:
        """Where the worker's other ranks join; None if it has only one."""
        return (await self._make()).rank_address

    async def progress(self) -> str:
        """How far it is in starting, for people."""
        return self._progress

    async def wait(self) -> None:
        """Never returns: the call in flight fails when the process is gone, and so tells of it."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Stop the worker program in good order; the process stays until it is killed."""
        if self._worker is not None:
            await asyncio.to_thread(self._worker.stop)

    async def _make(self) -> Worker:
        """The worker program, which is made once and does nothing before it is started."""
        if self._made is None:

            def make() -> Worker:
                return cast(
                    "Worker",
                    _load_class(self._class_path)(
                        name=self._name,
                        config=self._config,
                        device=self._device,
                        progress=self._note_progress,
                    ),
                )

            self._made = asyncio.create_task(asyncio.to_thread(make))
        return await asyncio.shield(self._made)

    async def _start(self) -> Endpoint | StartFailure:
        try:
            worker = await self._make()
            endpoint = await asyncio.to_thread(worker.start)
        except (ModelLoadError, ConfigError) as error:
            return StartFailure(error.message, fatal=True)
        except Exception as error:  # the cause travels to `tandem status`; the trace stays here
            log.exception("worker failed to start", worker=self._name)
            return StartFailure(f"{type(error).__name__}: {error}", fatal=False)
        self._worker = worker
        spare_what_is_here()
        return Endpoint(
            address=endpoint.address,
            metrics_address=endpoint.metrics_address,
            incarnation=endpoint.incarnation,
            pid=os.getpid(),
            node=_node_ip(),
            device=self._device,
        )

    def _note_progress(self, stage: str, fraction: float) -> None:
        self._progress = f"{stage} {fraction:.0%}" if 0 < fraction < 1 else stage


class RankActor:
    """Holds one rank, from 1 on, of a worker of several. It ends with the worker's rank 0."""

    def __init__(
        self,
        name: str,
        role: Role,
        config: TandemConfig,
        device: str,
        rank: int,
        *,
        several_nodes: bool,
    ) -> None:
        configure_logging(config.log_level)
        self._name = f"{name}/{rank}"
        self._arguments = (name, role, on_this_node(config, several_nodes=several_nodes), device)
        self._rank = rank
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return self._name

    async def start(self, address: RankAddress) -> None:
        """Join rank 0 and follow it, once. Returns at once: rank 0 knows how it goes."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, args=(address,), daemon=True)
            self._thread.start()

    async def wait(self) -> None:
        """Never returns, as that of `WorkerActor`."""
        await asyncio.Event().wait()

    def _follow(self, address: RankAddress) -> None:
        from tandem.worker.follower import FollowerRank

        try:
            FollowerRank(*self._arguments, self._rank, address).run()
        except Exception:  # rank 0 was told the cause, and its actor reports it
            log.exception("rank failed", rank=self._name)


class ControllerActor:
    """The one named actor that keeps the pools. Ray restarts it; it finds its workers by name."""

    def __init__(
        self, config: TandemConfig, worker_classes: Mapping[Role, str], dashboard: str
    ) -> None:
        from tandem.controller.runner import ControllerRunner

        configure_logging(config.log_level)
        self._runner = ControllerRunner(config, worker_classes, dashboard)
        self._address = asyncio.get_running_loop().create_future()
        self._running = asyncio.create_task(self._run())

    def __repr__(self) -> str:
        return "tandem-controller"

    async def address(self) -> str:
        """Where `Cluster` is served. Raises `TandemError` if it cannot be."""
        return cast("str", await asyncio.shield(self._address))

    async def fatal(self) -> str:
        """Why some worker can never start as configured; empty while all may."""
        return self._runner.fatal()

    async def stop(self) -> None:
        """End every worker in good order, then the gRPC server."""
        self._running.cancel()
        await self._runner.stop()

    async def _run(self) -> None:
        try:
            self._address.set_result(await self._runner.start())
            await self._runner.run()
        except asyncio.CancelledError:
            raise
        except TandemError as error:
            self._address.set_exception(error)
        except Exception:
            log.exception("the controller failed; Ray restarts it")
            os._exit(1)


def on_this_node(config: TandemConfig, *, several_nodes: bool) -> TandemConfig:
    """A loopback address reaches nobody on another node: take this node's own instead."""
    if not several_nodes or not _is_loopback(config.worker.host):
        return config
    worker = config.worker.model_copy(update={"host": _node_ip()})
    return config.model_copy(update={"worker": worker})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _node_ip() -> str:
    from ray.util import get_node_ip_address

    return cast("str", get_node_ip_address())  # type: ignore[no-untyped-call]


def _load_class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
