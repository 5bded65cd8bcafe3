"""The router learns what prefill workers hold from a stream to each of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from tandem.core.prefix_events import KEY_BYTES, PrefixEvents
from tandem.gateway.dispatch.prefix_followers import PrefixFollowers
from tandem.gateway.dispatch.view import Member
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire.prefixes import prefix_events_to_proto

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEY = b"k" * KEY_BYTES
SNAPSHOT = PrefixEvents(1, reset=True, stored=(KEY,))


class ScriptedPrefill(worker_pb2_grpc.PrefillServicer):
    """Says what the test puts into `says`; None ends the stream."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[worker_pb2.FollowPrefixesRequest] = asyncio.Queue()
        self.ended: asyncio.Queue[int] = asyncio.Queue()
        self.says: asyncio.Queue[PrefixEvents | None] = asyncio.Queue()

    async def FollowPrefixes(self, request, context):  # noqa: N802
        self.requests.put_nowait(request)
        try:
            while (events := await self.says.get()) is not None:
                yield prefix_events_to_proto(events)
        finally:
            self.ended.put_nowait(request.expected_incarnation)

    async def subscription(self) -> worker_pb2.FollowPrefixesRequest:
        return await asyncio.wait_for(self.requests.get(), 10)


class Scene:
    """One prefill worker, one gateway, and what the router would hear."""

    def __init__(self, worker: ScriptedPrefill, address: str) -> None:
        self.worker = worker
        self.address = address
        self.heard: asyncio.Queue[tuple[Member, PrefixEvents]] = asyncio.Queue()
        self.followers = PrefixFollowers(
            "gw", lambda *said: self.heard.put_nowait(said), random.Random(0)
        )

    def member(self, incarnation: int) -> Member:
        return Member("prefill-0", self.address, incarnation)

    def list(self, incarnation: int | None) -> None:
        """Publish the worker under an incarnation, or no worker."""
        listed = {} if incarnation is None else {"prefill-0": self.member(incarnation)}
        self.followers.update(listed)

    async def hears(self) -> tuple[Member, PrefixEvents]:
        return await asyncio.wait_for(self.heard.get(), 10)


@pytest_asyncio.fixture(loop_scope="session")
async def scene() -> AsyncIterator[Scene]:
    worker, server = ScriptedPrefill(), grpc.aio.server()
    worker_pb2_grpc.add_PrefillServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    scene = Scene(worker, f"127.0.0.1:{port}")
    yield scene
    await scene.followers.close()
    await server.stop(None)


async def test_a_snapshot_and_every_change_are_handed_on(scene: Scene) -> None:
    scene.list(5)
    request = await scene.worker.subscription()
    assert (request.gateway_id, request.expected_incarnation) == ("gw", 5)
    for events in (SNAPSHOT, PrefixEvents(2, evicted=(KEY,)), PrefixEvents(3)):
        scene.worker.says.put_nowait(events)
        assert await scene.hears() == (scene.member(5), events)


@pytest.mark.parametrize("wrong", [PrefixEvents(3, evicted=(KEY,)), PrefixEvents(1), None])
async def test_after_a_gap_or_a_loss_it_subscribes_anew(
    scene: Scene, wrong: PrefixEvents | None
) -> None:
    scene.list(5)
    await scene.worker.subscription()
    scene.worker.says.put_nowait(SNAPSHOT)
    assert await scene.hears() == (scene.member(5), SNAPSHOT)
    scene.worker.says.put_nowait(wrong)
    await scene.worker.subscription()
    scene.worker.says.put_nowait(SNAPSHOT)
    assert await scene.hears() == (scene.member(5), SNAPSHOT), "what was wrong is not handed on"


async def test_what_does_not_begin_with_a_snapshot_is_refused(scene: Scene) -> None:
    scene.list(5)
    await scene.worker.subscription()
    scene.worker.says.put_nowait(PrefixEvents(1, stored=(KEY,)))
    await scene.worker.subscription()
    assert scene.heard.empty()


async def test_another_incarnation_is_another_worker(scene: Scene) -> None:
    scene.list(5)
    await scene.worker.subscription()
    scene.list(6)
    assert (await scene.worker.subscription()).expected_incarnation == 6
    assert await asyncio.wait_for(scene.worker.ended.get(), 10) == 5
    scene.list(None)
    assert await asyncio.wait_for(scene.worker.ended.get(), 10) == 6


async def test_the_same_list_again_changes_nothing(scene: Scene) -> None:
    scene.list(5)
    await scene.worker.subscription()
    scene.list(5)
    scene.worker.says.put_nowait(SNAPSHOT)
    assert await scene.hears() == (scene.member(5), SNAPSHOT)
    assert scene.worker.requests.empty()
