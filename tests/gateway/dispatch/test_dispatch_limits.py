"""Full, refused, tried too often: what ends as an error, and what is tried elsewhere first."""

from __future__ import annotations

import asyncio

import pytest

from tandem.core.errors import InvalidRequestError, OverloadedError, TandemError, UnavailableError
from tandem.v1 import worker_pb2
from tandem.wire import error_to_failed

pytestmark = pytest.mark.asyncio(loop_scope="session")


def by_script(worker) -> None:
    worker.scripted = True


def refuse(worker, submit, error: Exception) -> None:
    worker.active.discard((submit.request_id, submit.attempt))
    worker.send(failed=error_to_failed(error, submit.request_id, submit.attempt))


async def test_a_new_request_waits_for_a_worker(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(decode=0)
    reader = asyncio.create_task(tools.collect(dispatcher.generate(make_request())))
    await tools.eventually(lambda: dispatcher.in_flight == 1)
    await cluster.replace("decode-0")
    await cluster.publish()
    assert await reader == tools.expected(make_request())
    assert cluster.observer.recoveries == []  # nothing was lost
    await cluster.assert_nothing_is_held()


async def test_a_new_request_does_not_wait_for_ever(cluster, make_request) -> None:
    dispatcher = await cluster.start(decode=0, no_worker_timeout=0.2)
    with pytest.raises(UnavailableError, match="no decode worker was ready within"):
        await anext(dispatcher.generate(make_request()))
    assert dispatcher.in_flight == 0


async def test_those_that_wait_for_a_worker_are_bounded(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(decode=0, router={"max_in_flight": 1})
    waiting = asyncio.create_task(tools.collect(dispatcher.generate(make_request())))
    await tools.eventually(lambda: dispatcher.in_flight == 1)
    with pytest.raises(OverloadedError, match="1 requests wait for one already"):
        await anext(dispatcher.generate(make_request()))
    waiting.cancel()
    await tools.eventually(lambda: dispatcher.in_flight == 0)


async def test_full_is_said_at_once(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=by_script, router={"max_in_flight": 1})
    readers = [
        asyncio.create_task(tools.collect(dispatcher.generate(make_request()))) for _ in range(2)
    ]
    served = [await cluster.serving() for _ in range(2)]
    assert {worker.name for worker, _ in served} == {"decode-0", "decode-1"}
    with pytest.raises(OverloadedError):
        await anext(dispatcher.generate(make_request()))
    assert dispatcher.in_flight == 2
    tokens = tools.expected(make_request())
    for worker, submit in served:
        worker.send_output(submit, 0, tokens, finish_reason=2)
    assert [await reader for reader in readers] == [tokens, tokens]
    reader = asyncio.create_task(tools.collect(dispatcher.generate(make_request())))
    worker, submit = await cluster.serving()
    worker.send_output(submit, 0, tokens, finish_reason=2)
    assert await reader == tokens


async def test_a_moved_request_waits_for_room(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=by_script, router={"max_in_flight": 1})
    requests = [make_request(max_tokens=2, prompt=(n, n + 1)) for n in range(2)]
    readers = [
        asyncio.create_task(tools.collect(dispatcher.generate(request))) for request in requests
    ]
    (doomed, _), (healthy, submit) = [await cluster.serving() for _ in range(2)]
    await doomed.die()
    await tools.eventually(lambda: len(dispatcher._traffic._parking) == 1)
    index = next(i for i, r in enumerate(requests) if list(submit.token_ids) == list(r.token_ids))
    healthy.scripted = False
    healthy.send_output(submit, 0, tools.expected(requests[index]), finish_reason=2)
    assert [await reader for reader in readers] == [tools.expected(r) for r in requests]


async def test_a_request_that_can_never_succeed_is_not_tried_again(
    cluster, make_request, tools
) -> None:
    dispatcher = await cluster.start(setup=by_script)
    reader = asyncio.create_task(tools.collect(dispatcher.generate(make_request())))
    worker, submit = await cluster.serving()
    refuse(worker, submit, InvalidRequestError("prompt is longer than the context"))
    with pytest.raises(InvalidRequestError, match="longer than the context"):
        await reader
    assert cluster.submits.empty()
    assert dispatcher.in_flight == 0


async def test_a_rejected_request_is_tried_elsewhere(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=by_script)
    request = make_request()
    reader = asyncio.create_task(tools.collect(dispatcher.generate(request)))
    worker, submit = await cluster.serving()
    cluster.other(worker).scripted = False
    refuse(worker, submit, OverloadedError("queue is full"))
    assert await reader == tools.expected(request)
    assert cluster.observer.recoveries == ["rejected"]


async def test_full_everywhere_is_overloaded(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=by_script)
    reader = asyncio.create_task(tools.collect(dispatcher.generate(make_request())))
    for _ in range(2):
        worker, submit = await cluster.serving()
        refuse(worker, submit, OverloadedError(f"{worker.name} is full"))
    with pytest.raises(OverloadedError, match=r"decode-. is full"):
        await reader
    assert dispatcher.in_flight == 0


async def test_a_stream_that_has_begun_is_not_refused_for_load(
    cluster, make_request, tools
) -> None:
    dispatcher = await cluster.start(decode=1, setup=by_script)
    request = make_request(max_tokens=5)
    reader = asyncio.create_task(tools.collect(dispatcher.generate(request)))
    worker, submit = await cluster.serving()
    worker.send_output(submit, 0, tools.expected(request)[:2])
    refuse(worker, submit, OverloadedError("no blocks"))
    worker.scripted = False
    assert await reader == tools.expected(request)
    _, again = await cluster.serving()
    assert (again.attempt, len(again.token_ids)) == (1, 7)


async def test_attempts_are_bounded_and_the_last_error_is_told(
    cluster, make_request, tools
) -> None:
    dispatcher = await cluster.start(setup=by_script, max_attempts=3)
    reader = asyncio.create_task(tools.collect(dispatcher.generate(make_request())))
    for attempt in range(3):
        worker, submit = await cluster.serving()
        assert submit.attempt == attempt
        refuse(worker, submit, TandemError(f"bug number {attempt}"))
    with pytest.raises(TandemError, match="bug number 2"):
        await reader
    assert cluster.submits.empty()
    await cluster.assert_nothing_is_held()


async def test_a_failure_of_an_old_attempt_is_refused(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(setup=by_script)
    request = make_request(max_tokens=2)
    reader = asyncio.create_task(tools.collect(dispatcher.generate(request)))
    worker, submit = await cluster.serving()
    worker.send(failed=worker_pb2.RequestFailed(request_id=submit.request_id, attempt=9))
    worker.send_output(submit, 0, tools.expected(request), finish_reason=2)
    assert await reader == tools.expected(request)
    assert cluster.observer.stale == ["attempt"]


async def test_values_that_no_message_can_hold_leak_nothing(cluster, make_request) -> None:
    dispatcher = await cluster.start()
    with pytest.raises(ValueError, match=r"out of range|Value"):
        await anext(dispatcher.generate(make_request(max_tokens=2**40)))
    assert dispatcher.in_flight == 0
    assert not any(worker.active for worker in cluster.workers.values())


async def test_another_prefill_worker_is_named(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start(prefill=2, setup=by_script)
    request = make_request(max_tokens=2)
    reader = asyncio.create_task(tools.collect(dispatcher.generate(request)))
    worker, submit = await cluster.serving()
    names = {"prefill-0", "prefill-1"}
    failed = submit.prefill.name
    assert failed in names

    def need(name: str, attempt: int = 0) -> None:
        worker.send(
            need_prefill=worker_pb2.NeedPrefill(
                request_id=submit.request_id, attempt=attempt, failed_worker=name, reason="gone"
            )
        )

    need(failed, attempt=5)  # stale: not answered
    need(failed)
    answer = await asyncio.wait_for(worker.reassigns.get(), 10)
    assert {answer.prefill.name} == names - {failed}
    assert answer.prefill.address == f"{answer.prefill.name}:1"
    need(answer.prefill.name)
    assert not (await asyncio.wait_for(worker.reassigns.get(), 10)).HasField("prefill")
    assert cluster.observer.stale == ["attempt"]
    assert cluster.observer.recoveries == ["prefill_reassigned"] * 2
    worker.send_output(submit, 0, tools.expected(request), finish_reason=2)
    assert await reader == tools.expected(request)


async def test_a_suspected_prefill_worker_is_avoided_until_it_is_another(
    cluster, make_request, tools
) -> None:
    dispatcher = await cluster.start(prefill=1, setup=by_script)
    streams = [asyncio.create_task(tools.collect(dispatcher.generate(make_request())))]
    worker, submit = await cluster.serving()
    worker.send(
        need_prefill=worker_pb2.NeedPrefill(
            request_id=submit.request_id, attempt=0, failed_worker="prefill-0"
        )
    )
    assert not (await asyncio.wait_for(worker.reassigns.get(), 10)).HasField("prefill")
    streams.append(asyncio.create_task(tools.collect(dispatcher.generate(make_request()))))
    assert not (await cluster.serving())[1].HasField("prefill")
    cluster.prefill["prefill-0"] = 2
    await cluster.publish()
    await tools.eventually(
        lambda: dispatcher._routing.membership.prefill["prefill-0"].incarnation == 2
    )
    streams.append(asyncio.create_task(tools.collect(dispatcher.generate(make_request()))))
    assert (await cluster.serving())[1].prefill.incarnation == 2
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await cluster.assert_nothing_is_held()
