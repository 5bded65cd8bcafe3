"""The two kinds of Ray actor: one around each worker program, one around the manager.

Both are async actors: their event loop answers while the work goes on in threads. Ray is handed
these classes by `launcher` and `session`; nothing here calls Ray except to learn where it runs.
"""

from __future__ import annotations

import asyncio
import importlib
import ipaddress
import os
from collections.abc import Mapping
from typing import Any, Protocol, cast

import structlog

from tandem.controller.logs import configure_logging
from tandem.controller.platform import StartFailure
from tandem.controller.roster import Endpoint, Role
from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError, ModelLoadError, TandemError

log = structlog.get_logger(__name__)

WORKER_CLASSES: Mapping[Role, str] = {
    "prefill": "tandem.prefill.worker:PrefillWorker",
    "decode": "tandem.decode.worker:DecodeWorker",
}


class Worker(Protocol):
    """What a worker program offers to its actor."""

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

    def __repr__(self) -> str:
        return self._name

    async def start(self) -> Endpoint | StartFailure:
        """Start the worker program once; a later call reports the same outcome."""
        if self._started is None:
            self._started = asyncio.create_task(asyncio.to_thread(self._start))
        return await asyncio.shield(self._started)

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

    def _start(self) -> Endpoint | StartFailure:
        try:
            worker = _load_class(self._class_path)(
                name=self._name,
                config=self._config,
                device=self._device,
                progress=self._note_progress,
            )
            endpoint = worker.start()
        except (ModelLoadError, ConfigError) as error:
            return StartFailure(error.message, fatal=True)
        except Exception as error:  # the cause travels to `tandem status`; the trace stays here
            log.exception("worker failed to start", worker=self._name)
            return StartFailure(f"{type(error).__name__}: {error}", fatal=False)
        self._worker = worker
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
