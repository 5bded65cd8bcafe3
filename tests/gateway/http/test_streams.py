"""Streams on a real connection: they flow, they are cancelled, and they never fake an end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from tandem.core.errors import UnavailableError

MESSAGES = [{"role": "user", "content": "hi"}]
BODY = {"messages": MESSAGES, "stream": True}


@pytest.fixture
async def http(server: Any) -> AsyncGenerator[httpx.AsyncClient, None]:
    base_url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
        yield client


async def test_tokens_arrive_while_later_ones_are_not_there_yet(
    http: httpx.AsyncClient, dispatcher: Any
) -> None:
    dispatcher.pause_at = 3
    async with http.stream("POST", "/v1/chat/completions", json=BODY) as response:
        lines = response.aiter_lines()
        seen = [line async for line in _take(lines, 8)]
        assert sum(line.startswith("data: ") for line in seen) == 4
        assert not dispatcher.resume.is_set()
        dispatcher.resume.set()
        rest = [line async for line in lines]
    assert rest[-2:] == ["data: [DONE]", ""]


async def _take(lines: Any, count: int) -> Any:
    for _ in range(count):
        yield await anext(lines)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_leaving_a_stream_cancels_it(
    http: httpx.AsyncClient, dispatcher: Any, path: str, n: int
) -> None:
    dispatcher.pause_at = 2
    body = {**BODY, "prompt": "hi", "n": n}
    async with http.stream("POST", path, json=body) as response:
        await anext(response.aiter_bytes())
        await dispatcher.paused.wait()
    cancelled = {await dispatcher.cancelled.get() for _ in dispatcher.requests}
    assert cancelled == {request.request_id for request in dispatcher.requests}
    assert dispatcher.active == set()


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token_cancels(
    http: httpx.AsyncClient, dispatcher: Any, stream: bool
) -> None:
    dispatcher.pause_at = 0
    call = asyncio.create_task(
        http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": stream})
    )
    await dispatcher.paused.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert await dispatcher.cancelled.get() == dispatcher.requests[0].request_id


async def test_leaving_is_counted_as_cancelled(
    http: httpx.AsyncClient, dispatcher: Any, metrics: Any
) -> None:
    dispatcher.pause_at = 1
    async with http.stream("POST", "/v1/chat/completions", json=BODY) as response:
        await anext(response.aiter_bytes())
        await dispatcher.paused.wait()
    await dispatcher.cancelled.get()
    labels = {"endpoint": "/v1/chat/completions", "outcome": "cancelled"}

    def count() -> float | None:
        value: float | None = metrics.registry.get_sample_value(
            "tandem_gateway_requests_total", labels
        )
        return value

    async with asyncio.timeout(10):
        while count() != 1.0:
            await asyncio.sleep(0)
    assert (
        metrics.registry.get_sample_value("tandem_gateway_requests_in_flight", {"api": "http"}) == 0
    )


@pytest.mark.parametrize(
    ("failure", "message", "kind"),
    [
        (UnavailableError("no worker left"), "no worker left", "service_unavailable_error"),
        (ValueError("a bug"), "internal error", "internal_server_error"),
    ],
)
async def test_a_late_failure_is_an_error_event_and_no_end(
    http: httpx.AsyncClient, dispatcher: Any, failure: Exception, message: str, kind: str
) -> None:
    dispatcher.errors[2] = failure
    response = await http.post("/v1/chat/completions", json=BODY)
    assert response.status_code == 200
    frames = response.text.strip().split("\n\n")
    last = json.loads(frames[-1].removeprefix("data: "))
    assert last["error"]["message"] == message
    assert last["error"]["type"] == kind
    assert "[DONE]" not in response.text
    assert '"finish_reason":"' not in response.text


async def test_a_stream_that_just_ends_is_an_error(
    http: httpx.AsyncClient, dispatcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = dispatcher._events

    async def without_end(request: Any) -> Any:
        async for event in complete(request):
            if event.finish_reason is None:
                yield event

    monkeypatch.setattr(dispatcher, "_events", without_end)
    response = await http.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert response.status_code == 500
    response = await http.post("/v1/chat/completions", json=BODY)
    assert "[DONE]" not in response.text
    assert "without a finish reason" in response.text


async def test_many_streams_at_once_do_not_mix(http: httpx.AsyncClient, dispatcher: Any) -> None:
    async def one(length: int) -> int:
        body = {"prompt": "hi", "max_tokens": length, "stream": True, "return_token_ids": True}
        response = await http.post("/v1/completions", json=body)
        events = [json.loads(frame[6:]) for frame in response.text.split("\n\n")[:-2]]
        return sum(len(event["choices"][0]["token_ids"]) for event in events)

    lengths = list(range(1, 25))
    dispatcher.reply = [5] * 30
    assert await asyncio.gather(*map(one, lengths)) == lengths
    assert dispatcher.active == set()


async def test_a_crowd_of_which_a_third_leaves(http: httpx.AsyncClient, dispatcher: Any) -> None:
    """The others are right, and nothing is left behind."""
    dispatcher.reply = [5] * 40

    async def stays(length: int) -> None:
        body = {"prompt": "hi", "max_tokens": length, "stream": True, "return_token_ids": True}
        response = await http.post("/v1/completions", json=body)
        events = [json.loads(frame[6:]) for frame in response.text.split("\n\n")[:-2]]
        assert sum(len(event["choices"][0]["token_ids"]) for event in events) == length
        assert response.text.endswith("data: [DONE]\n\n")

    async def leaves(chunks: int) -> None:
        body = {"prompt": "hi", "max_tokens": 50, "stream": True, "ignore_eos": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            for _ in range(chunks):
                await anext(lines)

    crowd = [leaves(i % 7) if i % 3 == 0 else stays(1 + i % 40) for i in range(90)]
    await asyncio.gather(*crowd)
    async with asyncio.timeout(10):
        while dispatcher.active:
            await asyncio.sleep(0)
    assert len(dispatcher.requests) == 90


async def test_further_choices_wait_for_the_first_token_of_their_prompt(
    http: httpx.AsyncClient, dispatcher: Any
) -> None:
    """By then the prompt is in the prefix cache."""
    dispatcher.pause_at = 0
    body = {"prompt": [[5], [6]], "n": 3, "max_tokens": 2}
    call = asyncio.create_task(http.post("/v1/completions", json=body))
    await dispatcher.paused.wait()
    await http.get("/health")
    assert [request.token_ids for request in dispatcher.requests] == [(5,), (6,)]
    dispatcher.resume.set()
    assert len((await call).json()["choices"]) == 6
    assert len(dispatcher.requests) == 6
