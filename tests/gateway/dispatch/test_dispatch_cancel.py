"""A request that its consumer leaves is over everywhere, in whatever window that happens."""

from __future__ import annotations

import asyncio
import gc

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_before_it_is_iterated_nothing_happens(cluster, make_request) -> None:
    dispatcher = await cluster.start()
    stream = dispatcher.generate(make_request())
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert cluster.submits.empty()
    assert dispatcher.in_flight == 0


@pytest.mark.parametrize("emitted", [0, 3])
async def test_closing_cancels_on_the_worker(cluster, make_request, tools, emitted) -> None:
    dispatcher = await cluster.start(setup=lambda worker: setattr(worker, "stop_after", emitted))
    stream = dispatcher.generate(make_request())
    await tools.take(stream, emitted)
    waiting = asyncio.create_task(anext(stream))
    worker, submit = await cluster.serving()
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):  # whoever waits is told at once
        await waiting
    cancel = await asyncio.wait_for(worker.cancels.get(), 10)
    assert (cancel.request_id, cancel.attempt) == (submit.request_id, 0)
    await cluster.assert_nothing_is_held()
    assert worker.cancels.empty()


async def test_a_cancelled_task_cancels_its_request(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=lambda worker: setattr(worker, "stop_after", 2))
    reader = asyncio.create_task(tools.collect(dispatcher.generate(make_request())))
    worker, _ = await cluster.serving()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await asyncio.wait_for(worker.cancels.get(), 10)
    await cluster.assert_nothing_is_held()


async def test_a_dropped_stream_cancels_its_request(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=lambda worker: setattr(worker, "stop_after", 2))
    stream = dispatcher.generate(make_request())
    await tools.take(stream, 2)
    worker, _ = await cluster.serving()
    del stream
    gc.collect()
    await asyncio.wait_for(worker.cancels.get(), 10)
    await cluster.assert_nothing_is_held()


async def test_while_it_waits_for_a_worker(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(
        decode=1, setup=lambda worker: setattr(worker, "stop_after", 2)
    )
    stream = dispatcher.generate(make_request())
    await tools.take(stream, 2)
    await cluster.serving()
    await cluster.workers["decode-0"].die()
    await tools.eventually(lambda: len(dispatcher._traffic._parking) == 1)
    await stream.aclose()
    assert len(dispatcher._traffic._parking) == 0
    assert dispatcher.in_flight == 0
    heir = await cluster.replace("decode-0")
    await cluster.publish()
    await tools.eventually(lambda: dispatcher.ready)
    assert not heir.active
    assert cluster.submits.empty()


async def test_after_it_was_moved(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=lambda worker: setattr(worker, "stop_after", 2))
    stream = dispatcher.generate(make_request())
    await tools.take(stream, 2)
    worker, _ = await cluster.serving()
    await worker.die()
    heir, submit = await cluster.serving()
    await stream.aclose()
    cancel = await asyncio.wait_for(heir.cancels.get(), 10)
    assert (cancel.request_id, cancel.attempt) == (submit.request_id, 1)
    await cluster.assert_nothing_is_held()


async def test_after_its_end_nothing_is_sent(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start()
    stream = dispatcher.generate(make_request())
    await tools.collect(stream)
    worker, _ = await cluster.serving()
    await stream.aclose()
    other = make_request(name="other")
    await tools.collect(dispatcher.generate(other))
    assert worker.cancels.empty()
    assert dispatcher.in_flight == 0


async def test_capacity_is_given_back_exactly_once(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(
        decode=1,
        setup=lambda worker: setattr(worker, "stop_after", 1),
        router={"max_in_flight": 2},
    )
    for _ in range(5):
        streams = [dispatcher.generate(make_request()) for _ in range(2)]
        for stream in streams:
            await tools.take(stream, 1)
        for stream in streams:
            await stream.aclose()
            await stream.aclose()
    await cluster.assert_nothing_is_held()
