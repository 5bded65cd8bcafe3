"""Acts on the roster's decisions: launches, probes, adopts, kills, and tells who watches.

Runs in one event loop and knows neither Ray nor how membership is published. One task per living
process starts it, probes it over gRPC and waits for its end; one task ticks the roster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace

import grpc
import grpc.aio
import structlog

from tandem.controller.platform import Platform, StartFailure
from tandem.controller.roster import Adopt, Endpoint, Kill, Launch, Member, Roster
from tandem.core.config import ControllerConfig
from tandem.v1 import cluster_pb2, worker_pb2, worker_pb2_grpc

log = structlog.get_logger(__name__)

PROGRESS_INTERVAL = 0.2
PROGRESS_TIMEOUT = 1.0
STOP_TIMEOUT = 6.0


class PoolManager:
    """Keeps every slot of a roster filled with a process that serves."""

    def __init__(
        self,
        roster: Roster,
        platform: Platform,
        config: ControllerConfig,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.roster = roster
        self._platform = platform
        self._config = config
        self._now = now
        self._statuses: dict[str, cluster_pb2.WorkerStatus] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._published = -1

    # -- what others read ------------------------------------------------------------------

    def members(self) -> tuple[Member, ...]:
        return self.roster.members()

    def status_of(self, name: str) -> cluster_pb2.WorkerStatus | None:
        """What the slot's living process last said of itself."""
        return self._statuses.get(name)

    def model_info(self) -> cluster_pb2.ModelInfo | None:
        """The model that the workers serve, once one of them has said so."""
        for status in self._statuses.values():
            if status.HasField("model_info"):
                return status.model_info
        return None

    async def wait_for_change(self, version: int) -> None:
        """Return once the membership version differs from `version`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.roster.version != version)

    # -- running ---------------------------------------------------------------------------

    async def recover(self) -> None:
        """Find the processes that live already; returns when each was heard or timed out."""
        names = await self._platform.discover()
        waits = []
        for name in names:
            self.roster.found(name, self._now())
            heard = asyncio.Event()
            self._spawn(self._live(name, found=True, heard=heard))
            waits.append(asyncio.create_task(heard.wait()))
        if waits:
            log.info("workers found again", workers=names)
            _, silent = await asyncio.wait(waits, timeout=self._config.worker_timeout)
            for task in silent:
                task.cancel()

    async def run(self) -> None:
        """Tick until cancelled."""
        period = min(0.25, self._config.heartbeat_interval)
        while True:
            for action in self.roster.tick(self._now()):
                match action:
                    case Launch(name):
                        self._spawn(self._live(name))
                    case Kill(name):
                        log.warning("killing silent worker", worker=name)
                        self._spawn(self._platform.kill(name))
                    case Adopt():
                        raise AssertionError("adopting follows an answer, not the clock")
            await self._publish()
            await asyncio.sleep(period)

    async def stop(self) -> None:
        """End every worker in good order."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        stops = (self._stop_one(slot.name) for slot in self.roster.slots)
        await asyncio.gather(*stops)

    async def _stop_one(self, name: str) -> None:
        try:
            await asyncio.wait_for(self._platform.stop(name), STOP_TIMEOUT)
        except TimeoutError:
            log.warning("worker did not stop, killing it", worker=name)
            await self._platform.kill(name)

    # -- one process -----------------------------------------------------------------------

    async def _live(
        self, name: str, *, found: bool = False, heard: asyncio.Event | None = None
    ) -> None:
        """See one process through: launch, start, probe, and bury it when it ends."""
        try:
            if not found:
                await self._platform.launch(name, self.roster.slot(name).role)
            death = asyncio.create_task(self._platform.wait_until_dead(name))
            try:
                await self._start_and_probe(name, death, heard or asyncio.Event())
                cause = await death
            finally:
                death.cancel()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever the platform raises is why this life ended
            log.exception("lost hold of a worker", worker=name)
            cause = f"{type(error).__name__}: {error}"
            await self._platform.kill(name)
        finally:
            self._statuses.pop(name, None)
            if heard is not None:
                heard.set()
        if self.roster.slot(name).state != "dead":
            log.warning("worker died", worker=name, cause=cause)
        self.roster.died(name, cause, self._now())
        await self._publish()

    async def _start_and_probe(
        self, name: str, death: asyncio.Task[str], heard: asyncio.Event
    ) -> None:
        start = asyncio.create_task(self._platform.start(name))
        try:
            while not start.done() and not death.done():
                await self._note_progress(name)
                await asyncio.wait(
                    {start, death}, timeout=PROGRESS_INTERVAL, return_when="FIRST_COMPLETED"
                )
            if death.done():
                return
            outcome = start.result()
        finally:
            start.cancel()
        if isinstance(outcome, StartFailure):
            log.error("worker failed to start", worker=name, cause=outcome.cause)
            await self._platform.kill(name)
            await death
            self.roster.start_failed(name, outcome.cause, self._now(), fatal=outcome.fatal)
            return
        probe = asyncio.create_task(self._probe(name, outcome, heard))
        try:
            await asyncio.wait({probe, death}, return_when="FIRST_COMPLETED")
            if probe.done():
                probe.result()
        finally:
            probe.cancel()

    async def _note_progress(self, name: str) -> None:
        """Ask once, without holding up the start that it asks about."""
        try:
            detail = await asyncio.wait_for(self._platform.progress(name), PROGRESS_TIMEOUT)
        except (TimeoutError, ConnectionError):
            return
        self.roster.progressed(name, detail, self._now())

    async def _probe(self, name: str, endpoint: Endpoint, heard: asyncio.Event) -> None:
        """Ask the worker how it is until it dies. Its first answer makes it a member."""
        known = False
        async with grpc.aio.insecure_channel(endpoint.address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            while True:
                status = await self._ask(stub)
                if status is not None:
                    self._statuses[name] = status
                    if not known:
                        current = replace(endpoint, incarnation=status.incarnation)
                        self.roster.started(name, current, self._now())
                        log.info("worker ready", worker=name, address=endpoint.address)
                    known = True
                    heard.set()
                    adopt = self.roster.answered(name, status.incarnation, self._now())
                    if adopt is not None:
                        await self._adopt(stub, adopt)
                    await self._publish()
                await asyncio.sleep(self._config.heartbeat_interval)

    async def _ask(self, stub: worker_pb2_grpc.WorkerAsyncStub) -> cluster_pb2.WorkerStatus | None:
        """One probe; None when the worker kept silent. The roster counts how long it does."""
        try:
            return await stub.Status(
                worker_pb2.WorkerStatusRequest(), timeout=self._config.worker_timeout
            )
        except grpc.aio.AioRpcError as error:
            log.debug("probe unanswered", code=error.code().name)
            return None

    async def _adopt(self, stub: worker_pb2_grpc.WorkerAsyncStub, adopt: Adopt) -> None:
        """Give a woken worker a new life; if this fails, the next answer asks again."""
        incarnation = max(time.time_ns(), adopt.burnt + 1)
        try:
            response = await stub.Adopt(
                worker_pb2.AdoptRequest(incarnation=incarnation),
                timeout=self._config.worker_timeout,
            )
        except grpc.aio.AioRpcError as error:
            log.warning("adoption failed", worker=adopt.name, code=error.code().name)
            return
        self.roster.adopted(adopt.name, response.incarnation, self._now())
        log.info("worker adopted", worker=adopt.name, incarnation=response.incarnation)

    # -- telling ---------------------------------------------------------------------------

    async def _publish(self) -> None:
        if self._published == self.roster.version:
            return
        self._published = self.roster.version
        log.info(
            "membership changed",
            version=self._published,
            members=[member.name for member in self.members()],
        )
        async with self._changed:
            self._changed.notify_all()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
