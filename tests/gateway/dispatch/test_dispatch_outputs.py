"""Every output is checked against what was asked and received; nothing unchecked is passed on."""

from __future__ import annotations

import asyncio

import pytest

from tandem.v1 import inference_pb2, worker_pb2

LENGTH = inference_pb2.FINISH_REASON_LENGTH
STOP = inference_pb2.FINISH_REASON_STOP

pytestmark = pytest.mark.asyncio(loop_scope="session")


def by_script(worker) -> None:
    worker.scripted = True


async def started(cluster, make_request, tools, **request_fields):
    """Start a scripted cluster with one request; return what a test needs of it."""
    dispatcher = await cluster.start(setup=by_script)
    request = make_request(**request_fields)
    events: list = []

    async def read() -> list[int]:
        async for event in dispatcher.generate(request):
            events.append(event)  # noqa: PERF401 - tests look at it while it grows
        return [token for event in events for token in event.token_ids]

    reader = asyncio.create_task(read())
    worker, submit = await cluster.serving()
    return request, reader, events, worker, submit


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"attempt": 7}, "attempt"),
        ({"request_id": "somebody-else"}, "request"),
    ],
)
async def test_a_stale_output_is_refused_and_counted(
    cluster, make_request, tools, fields, kind
) -> None:
    request, reader, _, worker, submit = await started(cluster, make_request, tools, max_tokens=2)
    worker.send_output(submit, 0, [990, 991], **fields)
    worker.send_output(submit, 0, tools.expected(request), finish_reason=LENGTH)
    assert await reader == tools.expected(request)
    assert cluster.observer.stale == [kind]


async def test_tokens_received_already_are_refused(cluster, make_request, tools) -> None:
    request, reader, _, worker, submit = await started(cluster, make_request, tools, max_tokens=3)
    tokens = tools.expected(request)
    worker.send_output(submit, 0, tokens[:2])
    worker.send_output(submit, 0, tokens[:2])
    worker.send_output(submit, 1, tokens[1:2])
    worker.send_output(submit, 2, tokens[2:], finish_reason=LENGTH)
    assert await reader == tokens
    assert cluster.observer.stale == ["output_index"] * 2


async def test_a_message_of_another_incarnation_ends_the_stream(
    cluster, make_request, tools
) -> None:
    request, reader, _, worker, submit = await started(cluster, make_request, tools, max_tokens=4)
    cluster.other(worker).scripted = False
    worker.send_output(submit, 0, [990], incarnation=1)
    assert await reader == tools.expected(request)
    assert cluster.observer.stale[0] == "incarnation"
    assert cluster.observer.recoveries == ["decode_lost"]


async def test_a_gap_is_never_passed_on(cluster, make_request, tools) -> None:
    request, reader, _, worker, submit = await started(cluster, make_request, tools, max_tokens=6)
    tokens = tools.expected(request)
    cluster.other(worker).scripted = False
    worker.send_output(submit, 0, tokens[:2])
    worker.send_output(submit, 3, tokens[3:4])
    assert await reader == tokens
    assert cluster.observer.recoveries == ["output_gap"]
    cancel = await worker.cancels.get()
    assert (cancel.request_id, cancel.attempt) == (submit.request_id, 0)
    heir, again = await cluster.serving()
    assert heir is not worker
    assert list(again.token_ids[5:]) == tokens[:2]
    await cluster.assert_nothing_is_held()


async def test_an_output_without_its_logprobs_fails_its_request_only(
    cluster, make_request, tools
) -> None:
    request, reader, _, worker, submit = await started(
        cluster, make_request, tools, max_tokens=1, logprobs=0
    )
    worker.send_output(submit, 0, tools.expected(request), finish_reason=LENGTH)
    heir, again = await cluster.serving()
    assert again.attempt == 1
    assert heir is not worker
    chosen = inference_pb2.TokenLogprob(token_id=1, logprob=-0.5, rank=1)
    entry = inference_pb2.PositionLogprobs(chosen=chosen)
    heir.send_output(again, 0, tools.expected(request), finish_reason=LENGTH, logprobs=[entry])
    assert await reader == tools.expected(request)
    assert cluster.observer.recoveries == ["invalid_output"]
    assert worker.hellos == 1  # the stream lives on


async def test_a_stop_token_is_named(cluster, make_request, tools) -> None:
    _, reader, events, worker, submit = await started(cluster, make_request, tools)
    worker.send_output(submit, 0, [44, 0], finish_reason=STOP, stop_token_id=0)
    assert await reader == [44, 0]
    assert (events[-1].finish_reason, events[-1].stop_token_id) == ("stop", 0)


@pytest.mark.parametrize("with_first", [True, False])
async def test_prompt_logprobs_come_once_and_are_asked_again_only_if_missing(
    cluster, make_request, tools, with_first
) -> None:
    request, reader, events, worker, submit = await started(
        cluster, make_request, tools, max_tokens=3, prompt_logprobs=0
    )
    tokens = tools.expected(request)
    entries = [
        inference_pb2.PositionLogprobs(
            chosen=inference_pb2.TokenLogprob(token_id=token, logprob=-0.25, rank=1)
        )
        for token in request.token_ids[1:]
    ]
    assert submit.sampling.HasField("prompt_logprobs")
    if with_first:
        worker.send_output(submit, 0, tokens[:1], prompt_logprobs=entries)
        await tools.eventually(lambda: len(events) == 1)
    else:
        worker.send_output(submit, 0, [], prompt_logprobs=entries[:2])  # died half-way
    await worker.die()
    heir, again = await cluster.serving()
    assert again.sampling.HasField("prompt_logprobs") != with_first
    start = 1 if with_first else 0
    heir.send_output(
        again,
        start,
        tokens[start:],
        finish_reason=LENGTH,
        prompt_logprobs=[] if with_first else entries,
    )
    assert await reader == tokens
    given = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    assert len(given) == 1
    assert given[0][0] is None
    assert [entry.chosen.token_id for entry in given[0][1:]] == list(request.token_ids[1:])


async def test_cached_tokens_are_those_of_the_first_attempt_that_answered(
    cluster, make_request, tools
) -> None:
    request, reader, events, worker, submit = await started(
        cluster, make_request, tools, max_tokens=3
    )
    tokens = tools.expected(request)
    first = worker_pb2.FirstTokenInfo(cached_tokens=4, prefill_worker="prefill-7")
    handover = worker_pb2.HandoverInfo(kv_bytes=9)
    worker.send_output(submit, 0, tokens[:1], first=first, handover=handover)
    await tools.eventually(lambda: len(events) == 1)
    await worker.die()
    heir, again = await cluster.serving()
    later = worker_pb2.FirstTokenInfo(cached_tokens=6, queue_seconds=0.5)
    heir.send_output(again, 1, tokens[1:], first=later, finish_reason=LENGTH)
    assert await reader == tokens
    assert [event.cached_tokens for event in events] == [4, 4]
    assert events[0].stages.prefill_worker == "prefill-7"
    assert events[0].handover.kv_bytes == 9
    assert events[1].stages.queue_seconds == 0.5


async def test_requests_of_one_name_do_not_mix(cluster, make_request, tools) -> None:
    dispatcher = await cluster.start()
    one = make_request(max_tokens=10, prompt=(1, 2, 3), name="same")
    two = make_request(max_tokens=10, prompt=(4, 5, 6), name="same")
    answers = await asyncio.gather(
        *(tools.collect(dispatcher.generate(request)) for request in (one, two))
    )
    assert answers == [tools.expected(one), tools.expected(two)]
