"""A whole cluster without Ray: worker processes, a membership server, and a dispatcher to call it.

The same workers, the same gRPC, the same process groups as under the controller; only who starts
the processes differs, so that tests can kill and freeze them at will and start in seconds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import grpc.aio
import httpx

from tandem.core.config import TandemConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.decode.worker import DecodeWorker
from tandem.gateway.dispatch import Dispatcher
from tandem.prefill.worker import PrefillWorker
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, worker_pb2, worker_pb2_grpc
from tandem.worker.follower import FollowerRank
from tandem.worker.ranks import RankAddress
from tandem.worker.runtime import WorkerEndpoint

MakeConfig = Callable[..., TandemConfig]
"""The `make_config` fixture: overrides by section in, a configuration for small tests out."""
Connect = Callable[["LocalCluster"], AbstractAsyncContextManager[Dispatcher]]
"""The `connect` fixture."""

_START_SECONDS = 60.0
_PRELOADED = ["tandem.decode.worker", "tandem.prefill.worker", "tandem.worker.follower"]
"""Imported once, in a clean process from which all workers are forked."""
_ROLES = {"prefill": PrefillWorker, "decode": DecodeWorker}


def _worker_main(
    role: str,
    name: str,
    config: TandemConfig,
    device: str,
    pipe: Connection,
    prepare: Callable[[str], None] | None,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if prepare is not None:
        prepare(name)
    worker = _ROLES[role](name, config, device)
    pipe.send(worker.rank_address)
    pipe.send(worker.start())
    try:
        pipe.recv()
    except EOFError:
        os._exit(1)  # the test process is gone
    worker.stop()


def _rank_main(
    role: str, name: str, config: TandemConfig, device: str, rank: int, address: RankAddress
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    FollowerRank(name, role, config, device, rank, address).run()


@dataclass
class WorkerProcess:
    """One worker and the processes that it runs in."""

    name: str
    role: str
    process: BaseProcess
    pipe: Connection
    endpoint: WorkerEndpoint
    followers: list[BaseProcess] = field(default_factory=list)
    """Its ranks from 1 on."""

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one of the worker's processes."""
        process = self.followers[rank - 1] if rank else self.process
        assert process.pid is not None
        os.kill(process.pid, number)

    def kill(self) -> None:
        """Kill -9 what is not gone already, and wait until all of it is."""
        for process in (self.process, *self.followers):
            process.kill()
            process.join(10)

    def stop(self) -> None:
        """End the processes, politely if they still listen."""
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.pipe.send(None)
        for process in (self.process, *self.followers):
            process.join(10)
        self.kill()
        self.pipe.close()


class _Membership(cluster_pb2_grpc.ClusterServicer):
    """Publishes what the test says."""

    def __init__(self) -> None:
        self.current = cluster_pb2.Membership()
        self.changed = asyncio.Condition()

    async def publish(self, membership: cluster_pb2.Membership) -> None:
        async with self.changed:
            membership.version = self.current.version + 1
            self.current = membership
            self.changed.notify_all()

    async def Watch(self, request, context):  # noqa: N802
        while True:
            yield (sent := self.current)
            async with self.changed:
                await self.changed.wait_for(lambda sent=sent: self.current is not sent)


@dataclass
class LocalCluster:
    """Started by `local_cluster(...)`."""

    config: TandemConfig
    device: str = "cpu"
    prepare: Callable[[str], None] | None = None
    """Called in each worker's process with its name before it starts; must be importable there."""
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    controller_address: str = ""
    _membership: _Membership = field(default_factory=_Membership)
    _info: cluster_pb2.ModelInfo = field(default_factory=cluster_pb2.ModelInfo)

    async def add(self, *workers: tuple[str, str]) -> None:
        """Start workers given as (role, name) side by side; replaces those of the same name."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        started = []
        for role, name in workers:
            ours, theirs = context.Pipe()
            arguments = (role, name, self.config, self.device)
            process = context.Process(
                target=_worker_main, args=(*arguments, theirs, self.prepare), daemon=True
            )
            process.start()
            theirs.close()
            started.append((arguments, process, ours))
        for arguments, process, pipe in started:
            role, name, *_ = arguments
            address = await self._answer(name, pipe)
            followers: list[BaseProcess] = [
                context.Process(target=_rank_main, args=(*arguments, rank, address), daemon=True)
                for rank in range(1, self.config.tensor_parallel(role))
            ]
            for follower in followers:
                follower.start()
            self.workers[name] = WorkerProcess(name, role, process, pipe, None, followers)
        for (_, name, *_), _, pipe in started:
            self.workers[name].endpoint = await self._answer(name, pipe)

    async def _answer(self, name: str, pipe: Connection) -> Any:
        if not await asyncio.to_thread(pipe.poll, _START_SECONDS):
            raise TimeoutError(f"{name} did not start")
        return pipe.recv()

    async def publish(self, names: Iterable[str] | None = None) -> None:
        """Publish the named workers (all by default) as the cluster's members."""
        members = [
            cluster_pb2.Member(
                name=worker.name,
                role=cluster_pb2.Role.Value(f"ROLE_{worker.role.upper()}"),
                address=worker.endpoint.address,
                incarnation=worker.endpoint.incarnation,
            )
            for name, worker in self.workers.items()
            if names is None or name in names
        ]
        decode = next(worker for worker in self.workers.values() if worker.role == "decode")
        if not self._info.name:
            self._info = (await self.status(decode.name)).model_info
        await self._membership.publish(
            cluster_pb2.Membership(
                members=members,
                disaggregated=self.config.worker.disaggregated,
                model=self._info,
            )
        )

    async def status(self, name: str) -> cluster_pb2.WorkerStatus:
        """Ask one worker for its status."""
        async with grpc.aio.insecure_channel(self.workers[name].endpoint.address) as channel:
            return await worker_pb2_grpc.WorkerStub(channel).Status(
                worker_pb2.WorkerStatusRequest(), timeout=10
            )

    async def violations(self, name: str) -> list[str]:
        """Let one worker check its blocks."""
        async with grpc.aio.insecure_channel(self.workers[name].endpoint.address) as channel:
            answer = await worker_pb2_grpc.WorkerStub(channel).CheckIntegrity(
                worker_pb2.CheckIntegrityRequest(), timeout=10
            )
            return list(answer.violations)

    async def metric(self, name: str, series: str) -> float:
        """Return the value of one series of a worker, given as it stands in its exposition."""
        address = self.workers[name].endpoint.metrics_address
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://{address}/metrics")).text
        values = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(series)]
        return sum(map(float, values))

    async def assert_all_free(self, names: Iterable[str] | None = None) -> None:
        """Every block of the named workers becomes free, and the pools are whole."""
        for name in names or self.workers:
            async with asyncio.timeout(20):
                while (status := await self.status(name)).blocks_used or status.running:
                    await asyncio.sleep(0.02)
            assert await self.violations(name) == []

    async def stop(self) -> None:
        for worker in self.workers.values():
            await asyncio.to_thread(worker.stop)


@asynccontextmanager
async def local_cluster(
    config: TandemConfig,
    prefill: int = 1,
    decode: int = 1,
    device: str = "cpu",
    prepare: Callable[[str], None] | None = None,
) -> AsyncIterator[LocalCluster]:
    """Run a cluster of worker processes for the duration of a test."""
    cluster = LocalCluster(config, device, prepare)
    server = grpc.aio.server()
    cluster_pb2_grpc.add_ClusterServicer_to_server(cluster._membership, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    cluster.controller_address = f"127.0.0.1:{port}"
    names = [("prefill", f"prefill-{i}") for i in range(prefill)]
    names += [("decode", f"decode-{i}") for i in range(decode)]
    try:
        await cluster.add(*names)
        await cluster.publish()
        yield cluster
    finally:
        await cluster.stop()
        await server.stop(grace=None)


class Recorder:
    """A `DispatchObserver` that remembers why requests moved."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self.stale: list[str] = []

    def recovered(self, cause: str) -> None:
        self.causes.append(cause)

    def stale_refused(self, kind: str) -> None:
        self.stale.append(kind)


async def until_ready(dispatcher: Dispatcher, seconds: float = 20) -> None:
    """Wait until the dispatcher has a decode worker that takes requests."""
    async with asyncio.timeout(seconds):
        while not dispatcher.ready:
            await asyncio.sleep(0.01)


async def generate(
    dispatcher: Dispatcher, request_id: str, prompt: list[int], **sampling: object
) -> list[int]:
    """Send one request and return the tokens that come out."""
    params = SamplingParams(**{"max_tokens": 16, "temperature": 0.0, **sampling})  # type: ignore[arg-type]
    request = Request(request_id, tuple(prompt), len(prompt), params)
    tokens: list[int] = []
    async for event in dispatcher.generate(request):
        tokens.extend(event.token_ids)
    return tokens
