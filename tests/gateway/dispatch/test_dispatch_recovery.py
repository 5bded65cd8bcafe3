"""Nothing is lost: whatever happens to a decode worker, its streams finish with the same tokens."""

from __future__ import annotations

import asyncio

import pytest

from tandem.core.errors import UnavailableError
from tandem.v1 import cluster_pb2

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_tokens_come_in_order_and_end_with_a_reason(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start()
    request = make_request(max_tokens=20)
    first, *more = [event async for event in dispatcher.generate(request)]
    events = [first, *more]  # tokens that come close together may share one
    assert [t for event in events for t in event.token_ids] == tools.expected(request)
    assert [event.finish_reason for event in events] == [None] * len(more) + ["length"]
    assert {event.cached_tokens for event in events} == {2}
    assert first.stages is not None
    assert all(event.stages is None for event in more)
    assert cluster.observer.recoveries == []
    await cluster.assert_nothing_is_held()


async def test_the_submission_is_complete(cluster, make_request) -> None:
    dispatcher = await cluster.start(prefill=1)
    stream = dispatcher.generate(make_request(max_tokens=3, seed=11, temperature=0.5, name="abc"))
    reader = asyncio.create_task(anext(stream))
    _, submit = await cluster.serving()
    assert submit.request_id.startswith("abc~")
    assert list(submit.token_ids) == [5, 6, 7, 8, 9]
    assert (submit.attempt, submit.prompt_len, submit.sampling.seed) == (0, 5, 11)
    assert submit.prefill.name == "prefill-0"
    assert (submit.prefill.address, submit.prefill.incarnation) == ("prefill-0:1", 1)
    await reader
    await stream.aclose()


@pytest.mark.parametrize("emitted", [0, 1, 5])
async def test_a_dead_worker_is_replaced_mid_stream(cluster, make_request, tools, emitted) -> None:
    dispatcher = await cluster.start(setup=lambda worker: setattr(worker, "stop_after", emitted))
    request = make_request(max_tokens=9)
    stream = dispatcher.generate(request)
    reader = asyncio.create_task(tools.collect(stream))
    worker, _ = await cluster.serving()
    await tools.eventually(lambda: len(flight_of(dispatcher).emitted) == emitted)
    heir = cluster.other(worker)
    heir.stop_after = None
    await worker.die()
    assert await reader == tools.expected(request)
    winner, submit = await cluster.serving()
    assert winner is heir
    assert submit.attempt == 1
    assert submit.prompt_len == 5
    assert list(submit.token_ids[5:]) == tools.expected(request)[:emitted]
    assert cluster.observer.recoveries == ["decode_lost"]
    await cluster.assert_nothing_is_held()


async def test_a_frozen_worker_is_left_and_its_waking_changes_nothing(
    cluster, make_request, tools
) -> None:
    dispatcher = await cluster.start(
        setup=lambda worker: setattr(worker, "stop_after", 3), worker_timeout=0.5
    )
    request = make_request(max_tokens=9)
    stream = dispatcher.generate(request)
    tokens = await tools.take(stream, 3)
    worker, _ = await cluster.serving()
    cluster.other(worker).stop_after = None
    worker.freeze()
    tokens += await tools.collect(stream)
    assert tokens == tools.expected(request)
    assert cluster.observer.recoveries == ["decode_frozen"]
    worker.wake()
    await tools.eventually(lambda: worker.hellos >= 2)  # met again in the background
    await cluster.assert_nothing_is_held()


async def test_a_worker_without_progress_is_left_though_it_beats(
    cluster, make_request, tools
) -> None:
    def stall(worker) -> None:
        worker.stop_after = 2
        worker.progressing = False

    dispatcher = await cluster.start(setup=stall, progress_timeout=0.4)
    request = make_request()
    stream = dispatcher.generate(request)
    tokens = await tools.take(stream, 2)
    worker, _ = await cluster.serving()
    cluster.other(worker).stop_after = None
    assert tokens + await tools.collect(stream) == tools.expected(request)
    assert cluster.observer.recoveries == ["decode_frozen"]


async def test_an_idle_worker_need_not_progress(cluster, make_request, tools) -> None:
    def idle(worker) -> None:
        worker.progressing = False

    dispatcher = await cluster.start(decode=1, setup=idle, progress_timeout=0.1)
    worker = cluster.workers["decode-0"]
    await tools.eventually(lambda: worker.beats > 8)  # several times progress_timeout
    assert dispatcher.ready
    assert worker.hellos == 1


async def test_the_only_worker_comes_back(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(
        decode=1, setup=lambda worker: setattr(worker, "stop_after", 4)
    )
    request = make_request(max_tokens=12)
    stream = dispatcher.generate(request)
    tokens = await tools.take(stream, 4)
    rest = asyncio.create_task(tools.collect(stream))
    await cluster.workers["decode-0"].die()
    await tools.eventually(lambda: not dispatcher.ready)
    later = asyncio.create_task(tools.collect(dispatcher.generate(make_request())))
    await tools.eventually(lambda: dispatcher.in_flight == 2)
    await cluster.replace("decode-0")
    await cluster.publish()
    assert tokens + await rest == tools.expected(request)
    assert await later == tools.expected(make_request())
    await cluster.assert_nothing_is_held()


async def test_the_model_stays_known_while_every_worker_is_replaced(
    cluster, make_request, tools
) -> None:
    dispatcher = await cluster.start(decode=1)
    model = dispatcher.model
    await cluster.workers["decode-0"].die()
    await cluster.controller.publish(cluster_pb2.Membership(version=100))
    await tools.eventually(lambda: not dispatcher.ready)
    assert dispatcher.model == model


async def test_a_request_does_not_wait_for_ever(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(
        decode=1, setup=lambda worker: setattr(worker, "stop_after", 4), no_worker_timeout=0.2
    )
    stream = dispatcher.generate(make_request())
    await tools.take(stream, 4)
    await cluster.workers["decode-0"].die()
    with pytest.raises(UnavailableError, match="was ready"):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert dispatcher.in_flight == 0


async def test_a_new_incarnation_takes_over_at_once(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(
        decode=1, setup=lambda worker: setattr(worker, "stop_after", 4)
    )
    old = cluster.workers["decode-0"]
    request = make_request()
    stream = dispatcher.generate(request)
    tokens = await tools.take(stream, 4)
    await cluster.replace("decode-0")
    await cluster.publish()  # the old one still runs and beats
    assert tokens + await tools.collect(stream) == tools.expected(request)
    await tools.eventually(lambda: not old.active)


async def test_a_worker_of_another_incarnation_is_not_used(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(decode=1)
    worker = cluster.workers["decode-0"]
    worker.adopt(1000)  # re-registered; the membership does not say so yet
    await tools.eventually(lambda: worker.refusals > 0)
    assert not dispatcher.ready
    await cluster.publish()
    await tools.eventually(lambda: dispatcher.ready)
    request = make_request()
    assert await tools.collect(dispatcher.generate(request)) == tools.expected(request)


async def test_a_worker_that_leaves_the_list_keeps_its_requests(
    cluster, make_request, tools
) -> None:
    dispatcher = await cluster.start(setup=lambda worker: setattr(worker, "scripted", True))
    request = make_request(max_tokens=2)
    stream = dispatcher.generate(request)
    reader = asyncio.create_task(tools.collect(stream))
    worker, submit = await cluster.serving()
    del cluster.workers[worker.name]
    await cluster.publish()
    await tools.eventually(lambda: dispatcher._pool.accepting == list(cluster.workers))
    tokens = tools.expected(request)
    worker.send_output(submit, 0, tokens, finish_reason=2)
    assert await reader == tokens
    assert cluster.observer.recoveries == []
    await tools.eventually(lambda: worker.name not in dispatcher._pool._streams)


async def test_a_complete_answer_is_not_submitted_again(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=lambda worker: setattr(worker, "scripted", True))
    request = make_request(max_tokens=3)
    stream = dispatcher.generate(request)
    reader = asyncio.create_task(tools.collect(stream))
    worker, submit = await cluster.serving()
    worker.send_output(submit, 0, tools.expected(request))  # all of it, but no finish reason
    await tools.eventually(lambda: len(flight_of(dispatcher).emitted) == 3)
    await worker.die()
    assert await reader == tools.expected(request)
    assert cluster.submits.empty()
    assert cluster.observer.recoveries == ["decode_lost"]
    assert dispatcher.in_flight == 0


async def test_the_controller_may_be_away(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start()
    await cluster.controller.stop()
    request = make_request()
    assert await tools.collect(dispatcher.generate(request)) == tools.expected(request)
    assert dispatcher.ready
    await cluster.replace("decode-9")
    await cluster.controller.start()
    await cluster.publish()
    await tools.eventually(lambda: "decode-9" in dispatcher._pool.accepting)


async def test_closing_fails_what_is_in_flight(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=lambda worker: setattr(worker, "stop_after", 1))
    stream = dispatcher.generate(make_request())
    await tools.take(stream, 1)
    await dispatcher.close()
    with pytest.raises(UnavailableError, match="shutting down"):
        await anext(stream)
    assert dispatcher.in_flight == 0
    with pytest.raises(UnavailableError):
        await anext(dispatcher.generate(make_request()))


def flight_of(dispatcher):
    """The only request in flight."""
    (flight,) = dispatcher._traffic._flights.values()
    return flight
