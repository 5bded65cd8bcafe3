"""Puts the controller together: roster, platform, manager and gRPC server, in the right order.

A restarted controller hears its workers before it publishes, so that no gateway is ever told that
the cluster is empty when it is not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import grpc.aio

from tandem.controller.launcher import RayPlatform
from tandem.controller.manager import PoolManager
from tandem.controller.roster import Role, Roster, RosterTimeouts
from tandem.controller.service import ClusterService, serve_cluster
from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError

BIND_ATTEMPTS = 20
BIND_INTERVAL = 0.5


def pool_slots(config: TandemConfig) -> tuple[tuple[str, Role], ...]:
    """The workers that a configuration asks for. Colocated serving has no prefill pool."""
    controller = config.controller
    num_prefill = controller.prefill_workers if config.worker.disaggregated else 0
    prefill: list[tuple[str, Role]] = [(f"prefill-{i}", "prefill") for i in range(num_prefill)]
    decode: list[tuple[str, Role]] = [
        (f"decode-{i}", "decode") for i in range(controller.decode_workers)
    ]
    return (*prefill, *decode)


class ControllerRunner:
    """`start`, then `run` until `stop`."""

    def __init__(
        self, config: TandemConfig, worker_classes: Mapping[Role, str], dashboard: str
    ) -> None:
        slots = pool_slots(config)
        timeouts = RosterTimeouts(config.controller.worker_timeout, config.controller.replace_after)
        # Milliseconds since the epoch: a restarted controller goes on above its predecessor.
        roster = Roster(slots, timeouts, first_version=time.time_ns() // 1_000_000)
        platform = RayPlatform(config, worker_classes, tuple(name for name, _ in slots))
        self._config = config
        self._manager = PoolManager(roster, platform, config.controller)
        self._service = ClusterService(self._manager, config, dashboard)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Find living workers, then serve. Returns the address; raises `ConfigError`."""
        await self._manager.recover()
        return await self._listen()

    async def run(self) -> None:
        """Keep the pools until cancelled."""
        await self._manager.run()

    async def stop(self) -> None:
        """End the workers, then the server."""
        await self._manager.stop()
        if self._server is not None:
            await self._server.stop(grace=0.5)

    def fatal(self) -> str:
        """Why some worker can never start as configured; empty while all may."""
        causes = [slot.detail for slot in self._manager.roster.slots if slot.fatal]
        return causes[0] if causes else ""

    async def _listen(self) -> str:
        """Bind the port; the predecessor's process may take a moment to let go of it."""
        host, port = self._config.controller.host, self._config.controller.port
        for attempt in range(BIND_ATTEMPTS):
            try:
                self._server, address = await serve_cluster(self._service, host, port)
            except OSError as error:
                if attempt == BIND_ATTEMPTS - 1:
                    raise ConfigError(f"controller.port: {error}") from error
                await asyncio.sleep(BIND_INTERVAL)
            else:
                return address
        raise ConfigError(f"controller.port: cannot listen on {host}:{port}")
