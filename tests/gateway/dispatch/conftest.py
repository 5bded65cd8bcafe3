"""A scripted cluster: real gRPC servers that play controller and decode workers by a script.

The scripted workers draw tokens by `next_token`, a function of all tokens before, so that a stream
that was resumed elsewhere has one right answer.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import grpc
import pytest
import pytest_asyncio

from tandem.core.config import GatewayConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.gateway.dispatch import Dispatcher
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, worker_pb2, worker_pb2_grpc

HEARTBEAT_SECONDS = 0.05
CACHED_TOKENS = 2
Serving = tuple["ScriptedWorker", worker_pb2.Submit]


def next_token(token_ids: list[int]) -> int:
    """The one token that follows these."""
    return zlib.crc32(b"".join(token.to_bytes(4, "little") for token in token_ids)) % 997


def expected_tokens(request: Request) -> list[int]:
    """The whole answer to a request, however it is served."""
    token_ids = list(request.token_ids)
    while len(token_ids) < request.max_len:
        token_ids.append(next_token(token_ids))
    return token_ids[request.prompt_len :]


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


@dataclass
class Observer:
    """Remembers what the dispatcher reports."""

    recoveries: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    def recovered(self, cause: str) -> None:
        self.recoveries.append(cause)

    def stale_refused(self, kind: str) -> None:
        self.stale.append(kind)


class ScriptedWorker(worker_pb2_grpc.DecodeServicer):
    """One incarnation of a decode worker.

    `stop_after`: tokens of an attempt after which it goes on heart-beating but makes nothing more.
    `scripted`: it makes nothing at all; the test sends what it wants with `send`.
    """

    def __init__(self, name: str, incarnation: int, submits: asyncio.Queue[Serving]) -> None:
        self.name = name
        self.incarnation = incarnation
        self.address = ""
        self.stop_after: int | None = None
        self.scripted = False
        self.progressing = True
        self.active: set[tuple[str, int]] = set()
        self.cancels: asyncio.Queue[worker_pb2.Cancel] = asyncio.Queue()
        self.reassigns: asyncio.Queue[worker_pb2.Reassign] = asyncio.Queue()
        self.hellos = 0
        self.refusals = 0
        self.beats = 0
        self._submits = submits
        self._outbox: asyncio.Queue[worker_pb2.DecodeMessage | None] = asyncio.Queue()
        self._awake = asyncio.Event()
        self._awake.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = grpc.aio.server()

    async def start(self) -> None:
        worker_pb2_grpc.add_DecodeServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def die(self) -> None:
        await self._server.stop(None)

    def adopt(self, incarnation: int) -> None:
        """Take a new incarnation: every stream ends."""
        self.incarnation = incarnation
        self._outbox.put_nowait(None)

    def freeze(self) -> None:
        self._awake.clear()

    def wake(self) -> None:
        self._awake.set()

    def send(self, *, incarnation: int | None = None, **kind: object) -> None:
        stamp = self.incarnation if incarnation is None else incarnation
        self._outbox.put_nowait(worker_pb2.DecodeMessage(incarnation=stamp, **kind))

    def send_output(
        self, submit: worker_pb2.Submit, index: int, token_ids: list[int], **fields: object
    ) -> None:
        """Send outputs that begin at `index`; `fields` override what is in the entry."""
        entry = {"request_id": submit.request_id, "attempt": submit.attempt, **fields}
        incarnation = entry.pop("incarnation", None)
        output = worker_pb2.SequenceOutput(output_index=index, token_ids=token_ids, **entry)
        self.send(outputs=worker_pb2.OutputBatch(outputs=[output]), incarnation=incarnation)

    async def Serve(self, request_iterator, context):  # noqa: N802
        await self._awake.wait()
        messages = aiter(request_iterator)
        hello = (await anext(messages)).hello
        if hello.expected_incarnation != self.incarnation:
            self.refusals += 1
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another incarnation")
        self._outbox = asyncio.Queue()
        self.hellos += 1
        yield worker_pb2.DecodeMessage(
            incarnation=self.incarnation, hello=worker_pb2.DecodeHello(name=self.name)
        )
        helpers = [asyncio.create_task(self._read(messages)), asyncio.create_task(self._beat())]
        try:
            while (message := await self._outbox.get()) is not None:
                await self._awake.wait()
                yield message
        finally:
            for task in (*helpers, *self._tasks):
                task.cancel()
            self.active.clear()

    async def _read(self, messages: AsyncIterator[worker_pb2.GatewayMessage]) -> None:
        async for message in messages:
            await self._awake.wait()
            match message.WhichOneof("kind"):
                case "submit":
                    self.active.add((message.submit.request_id, message.submit.attempt))
                    self._submits.put_nowait((self, message.submit))
                    if not self.scripted:
                        task = asyncio.create_task(self._generate(message.submit))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
                case "cancel":
                    self.active.discard((message.cancel.request_id, message.cancel.attempt))
                    self.cancels.put_nowait(message.cancel)
                case "reassign":
                    self.reassigns.put_nowait(message.reassign)

    async def _beat(self) -> None:
        iterations = 0
        while True:
            iterations += self.progressing
            self.send(heartbeat=worker_pb2.Heartbeat(iterations=iterations))
            self.beats += 1
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _generate(self, submit: worker_pb2.Submit) -> None:
        token_ids = list(submit.token_ids)
        key = (submit.request_id, submit.attempt)
        made = 0
        while key in self.active and made != self.stop_after:
            index = len(token_ids) - submit.prompt_len
            token_ids.append(next_token(token_ids))
            last = index + 1 == submit.sampling.max_tokens
            first = worker_pb2.FirstTokenInfo(cached_tokens=CACHED_TOKENS + submit.attempt)
            self.send_output(
                submit,
                index,
                token_ids[-1:],
                first=None if made else first,
                finish_reason=inference_pb2.FINISH_REASON_LENGTH if last else None,
            )
            if last:
                self.active.discard(key)
            made += 1
            await asyncio.sleep(0.001)


class ScriptedController(cluster_pb2_grpc.ClusterServicer):
    """Publishes whatever membership the test gives it."""

    def __init__(self) -> None:
        self.address = ""
        self.watches = 0
        self._membership = cluster_pb2.Membership()
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server()
        cluster_pb2_grpc.add_ClusterServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    async def publish(self, membership: cluster_pb2.Membership) -> None:
        async with self._changed:
            self._membership = membership
            self._changed.notify_all()

    async def Watch(self, request, context):  # noqa: N802
        self.watches += 1
        while True:
            membership = self._membership
            yield membership
            async with self._changed:
                await self._changed.wait_for(lambda seen=membership: self._membership is not seen)


class ScriptedCluster:
    """Controller, workers, and the dispatchers under test."""

    def __init__(self) -> None:
        self.controller = ScriptedController()
        self.workers: dict[str, ScriptedWorker] = {}
        self.prefill: dict[str, int] = {}
        self.submits: asyncio.Queue[Serving] = asyncio.Queue()
        self.observer = Observer()
        self.dispatcher: Dispatcher
        self._all: list[ScriptedWorker] = []
        self._version = 0

    async def start(
        self,
        decode: int = 2,
        prefill: int = 0,
        setup: Callable[[ScriptedWorker], None] | None = None,
        **config: object,
    ) -> Dispatcher:
        """Start peers and dispatcher; return it when every decode worker has met it."""
        await self.controller.start()
        for index in range(decode):
            setup_worker = await self.replace(f"decode-{index}")
            if setup is not None:
                setup(setup_worker)
        self.prefill = {f"prefill-{index}": 1 for index in range(prefill)}
        await self.publish()
        settings = {"worker_timeout": 5.0, "progress_timeout": 30.0, "no_worker_timeout": 10.0}
        self.dispatcher = Dispatcher(
            GatewayConfig(**{**settings, **config}), self.controller.address, self.observer, seed=1
        )
        await self.dispatcher.start()
        await eventually(lambda: self.dispatcher.model is not None)
        await eventually(lambda: len(self.dispatcher._pool.accepting) == decode)
        return self.dispatcher

    async def replace(self, name: str) -> ScriptedWorker:
        """Start a new incarnation of a worker; `publish` makes it known."""
        worker = ScriptedWorker(name, 100 + len(self._all), self.submits)
        self._all.append(worker)
        await worker.start()
        self.workers[name] = worker
        return worker

    async def publish(self) -> None:
        self._version += 1
        decode = [
            cluster_pb2.Member(
                name=worker.name,
                role=cluster_pb2.ROLE_DECODE,
                address=worker.address,
                incarnation=worker.incarnation,
            )
            for worker in self.workers.values()
        ]
        prefill = [
            cluster_pb2.Member(
                name=name,
                role=cluster_pb2.ROLE_PREFILL,
                address=f"{name}:1",
                incarnation=incarnation,
            )
            for name, incarnation in self.prefill.items()
        ]
        model = cluster_pb2.ModelInfo(
            name="scripted",
            path="/models/scripted",
            max_model_len=4096,
            block_size=4,
            vocab_size=1000,
        )
        await self.controller.publish(
            cluster_pb2.Membership(
                version=self._version, members=[*decode, *prefill], disaggregated=True, model=model
            )
        )

    async def serving(self) -> Serving:
        """Return the next submission and the worker that it reached."""
        return await asyncio.wait_for(self.submits.get(), 10)

    def other(self, worker: ScriptedWorker) -> ScriptedWorker:
        """Return one of the workers that is not this one."""
        return next(w for w in self.workers.values() if w is not worker)

    async def assert_nothing_is_held(self) -> None:
        """Every request is over for the dispatcher, its router and every living worker."""
        await eventually(lambda: self.dispatcher.in_flight == 0)
        await eventually(lambda: not any(worker.active for worker in self.workers.values()))

    async def close(self) -> None:
        if hasattr(self, "dispatcher"):
            await self.dispatcher.close()
        for worker in self._all:
            worker.wake()
            await worker.die()
        await self.controller.stop()


# One event loop for all: gRPC's completion queue outlives a loop and trips over closed ones.
@pytest_asyncio.fixture(loop_scope="session")
async def cluster() -> AsyncIterator[ScriptedCluster]:
    scripted = ScriptedCluster()
    yield scripted
    await scripted.close()


@pytest.fixture
def make_request() -> Callable[..., Request]:
    def make(
        max_tokens: int = 8,
        prompt: tuple[int, ...] = (5, 6, 7, 8, 9),
        name: str = "req",
        **sampling: object,
    ) -> Request:
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        return Request(name, tuple(prompt), len(prompt), params)

    return make


async def collect(stream) -> list[int]:
    """Read a stream to its end; fail if it does not end with a finish reason."""
    tokens: list[int] = []
    reasons = []
    async for event in stream:
        tokens.extend(event.token_ids)
        reasons.append(event.finish_reason)
    assert reasons[-1] is not None
    assert set(reasons[:-1]) <= {None}
    return tokens


async def take(stream, count: int) -> list[int]:
    """Read until there are `count` tokens; more, if they came together."""
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.extend((await asyncio.wait_for(anext(stream), 10)).token_ids)
    return tokens


@pytest.fixture
def tools() -> SimpleNamespace:
    """Helper functions of this file; test modules cannot import it."""
    return SimpleNamespace(
        collect=collect, take=take, eventually=eventually, expected=expected_tokens, next=next_token
    )
