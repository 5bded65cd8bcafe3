"""What a prefill worker tells the gateways that follow its prefix cache, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from tandem.core.config import SchedulerConfig
from tandem.core.prefix_events import PrefixEvents
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.prefix_journal import REMEMBERED, PrefixJournal
from tandem.prefill import sessions
from tandem.prefill.sessions import PrefillService
from tandem.scheduler import Scheduler
from tandem.scheduler.costs import Work
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire.prefixes import prefix_events_from_proto
from tandem.worker.engine_loop import EngineLoop

pytestmark = pytest.mark.asyncio(loop_scope="session")

INCARNATION = 7
Stub = worker_pb2_grpc.PrefillStub


class Worker:
    """As much of a prefill worker's runtime as its cache's followers need, with 8 blocks."""

    def __init__(self) -> None:
        self.name, self.incarnation = "prefill-0", INCARNATION
        self.pool = BlockPool(8, 4)
        self.journal = PrefixJournal(self.pool, None)
        self.loop = EngineLoop(self.name, lambda: False)
        self.config = SimpleNamespace(worker=SimpleNamespace(heartbeat_interval=0.01))
        self.scheduler = Scheduler(SchedulerConfig(max_batch_tokens=64), self.pool, 1024)
        self.metrics = SimpleNamespace(stale=SimpleNamespace(inc=lambda: None))

    def store(self, *names: bytes) -> None:
        """Compute and keep one block per name; the oldest make room."""
        for name in names:
            (block,) = self.pool.allocate(1, "x")
            self.pool.publish(block, name * 16)
            self.pool.release([block], "x")

    async def do(self, function: Callable[..., None], *args: Any) -> None:
        await self.loop.call(function, *args)


@asynccontextmanager
async def served(worker: Worker) -> AsyncIterator[Stub]:
    server = grpc.aio.server()
    service = PrefillService(cast("Any", worker), cast("Any", None))
    worker_pb2_grpc.add_PrefillServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    worker.loop.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Stub(channel)
    finally:
        await server.stop(None)
        worker.loop.stop()


def follow(stub: Stub, incarnation: int = INCARNATION) -> Any:
    return stub.FollowPrefixes(
        worker_pb2.FollowPrefixesRequest(gateway_id="gw", expected_incarnation=incarnation)
    )


async def following(call: Any) -> PrefixEvents:
    return prefix_events_from_proto(await asyncio.wait_for(call.read(), 10))


def said(number: int, **changes: Any) -> PrefixEvents:
    """What is due from a worker that has measured nothing yet."""
    return PrefixEvents(number, host_value=0.5, **changes)


def keys(*names: bytes) -> tuple[bytes, ...]:
    return tuple(name * 8 for name in names)


async def test_each_gateway_gets_a_snapshot_whenever_it_comes_and_then_the_changes() -> None:
    worker = Worker()
    async with served(worker) as stub:
        early = follow(stub)
        assert await following(early) == said(1, reset=True)
        await worker.do(worker.store, b"a", b"b")
        assert await following(early) == said(2, stored=keys(b"a", b"b"))
        late = follow(stub)
        assert await following(late) == said(1, reset=True, stored=keys(b"a", b"b"))
        await worker.do(worker.store, *[bytes([n]) for n in range(8)])
        for call, number in ((early, 3), (late, 2)):
            events = await following(call)
            assert events.number == number
            assert set(events.evicted) == set(keys(b"a", b"b"))
            assert len(events.stored) == 8


async def test_its_messages_say_what_a_prompt_token_takes_once_that_is_measured() -> None:
    worker = Worker()
    async with served(worker) as stub:
        call = follow(stub)
        assert (await following(call)).prompt_token_seconds == 0.0
        for tokens in (8, 16, 24, 32, 40, 48, 56, 64):
            work = Work(prompt_tokens=tokens)
            await worker.do(worker.scheduler.costs.measured, work, 0.064 + 0.002 * tokens)
        await worker.do(worker.store, b"a")
        assert (await following(call)).prompt_token_seconds == pytest.approx(0.003, rel=0.01)


async def test_who_has_nothing_to_say_gives_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "SIGN_OF_LIFE_SECONDS", 0.0)
    async with served(Worker()) as stub:
        call = follow(stub)
        assert await following(call) == said(1, reset=True)
        assert [await following(call) for _ in range(2)] == [said(2), said(3)]


async def test_one_that_fell_behind_starts_over_and_nothing_was_queued_for_it() -> None:
    worker = Worker()
    async with served(worker) as stub:
        call = follow(stub)
        assert (await following(call)).reset

        def change_much() -> None:
            for _ in range(REMEMBERED // 8):
                worker.store(*[bytes([n]) for n in range(16)])

        await worker.do(change_much)
        events = await following(call)
        assert events.reset
        assert set(events.stored) == set(keys(*[bytes([n]) for n in range(8, 16)]))


async def test_an_incarnation_that_is_over_has_no_followers() -> None:
    worker = Worker()
    async with served(worker) as stub:
        call = follow(stub)
        assert (await following(call)).reset
        worker.incarnation = INCARNATION + 1
        assert await asyncio.wait_for(call.read(), 10) is grpc.aio.EOF
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await follow(stub).read()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "expected incarnation 7, this is 8" in (refused.value.details() or "")
