"""Answers are kept for those who ask the same, and computed once for those who ask together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc.aio
import httpx
import pytest
from google.protobuf.json_format import ParseDict

from tandem.core.config import GatewayConfig, SchedulerConfig
from tandem.core.errors import UnavailableError
from tandem.gateway.http.app import create_app
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.output import TextEvent
from tandem.gateway.response_cache import ResponseCache
from tandem.gateway.server import GatewayServer, make_service
from tandem.v1 import inference_pb2

TTL = 10.0
GREEDY = {"prompt": "the quick", "max_tokens": 4, "temperature": 0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Computation:
    """An answer of some characters that waits for `go` before each, and counts its runs."""

    def __init__(self, text: str = "abc", *, ready: bool = True) -> None:
        self.text = text
        self.runs = 0
        self.closed = 0
        self.go = asyncio.Semaphore(1000 if ready else 0)
        self.error: Exception | None = None

    async def __call__(self) -> AsyncGenerator[TextEvent, None]:
        self.runs += 1
        try:
            for number, character in enumerate(self.text):
                await self.go.acquire()
                if self.error is not None:
                    raise self.error
                yield TextEvent(character, (number,))
        finally:
            self.closed += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(metrics: GatewayMetrics, clock: Clock) -> ResponseCache:
    return ResponseCache(3000, TTL, metrics, clock)


async def read(
    cache: ResponseCache, key: bytes, compute: Callable[[], AsyncGenerator[TextEvent, None]]
) -> tuple[str, str | None]:
    events = [event async for event in cache.stream(key, compute)]
    assert all(event.cache is None for event in events[1:])
    return "".join(event.text for event in events), events[0].cache


async def test_asked_again_it_is_replayed(cache: ResponseCache) -> None:
    compute = Computation()
    assert await read(cache, b"k", compute) == ("abc", "miss")
    assert await read(cache, b"k", compute) == ("abc", "hit")
    assert await read(cache, b"other", compute) == ("abc", "miss")
    assert compute.runs == 2


async def test_requests_in_flight_are_computed_once_and_streamed_to_all(
    cache: ResponseCache,
) -> None:
    compute = Computation(ready=False)
    streams = [cache.stream(b"k", compute) for _ in range(3)]
    compute.go.release()
    firsts = [await anext(stream) for stream in streams]
    assert [event.text for event in firsts] == ["a"] * 3
    assert [event.cache for event in firsts] == ["miss", "hit", "hit"]
    compute.go.release()
    compute.go.release()
    rest = ["".join([event.text async for event in stream]) for stream in streams]
    assert rest == ["bc"] * 3
    assert compute.runs == 1


async def test_it_goes_on_while_anyone_reads_and_ends_with_the_last(cache: ResponseCache) -> None:
    compute = Computation(ready=False)
    first, second = cache.stream(b"k", compute), cache.stream(b"k", compute)
    compute.go.release()
    await anext(first)
    await anext(second)
    await first.aclose()
    compute.go.release()
    assert (await anext(second)).text == "b"
    await second.aclose()
    assert compute.closed == 1
    assert len(cache) == 0


async def test_a_failed_answer_is_told_to_all_and_not_kept(cache: ResponseCache) -> None:
    compute = Computation()
    compute.error = UnavailableError("no worker")
    results = await asyncio.gather(
        *(read(cache, b"k", compute) for _ in range(2)), return_exceptions=True
    )
    assert all(isinstance(result, UnavailableError) for result in results)
    compute.error = None
    assert await read(cache, b"k", compute) == ("abc", "miss")


async def test_it_expires(cache: ResponseCache, clock: Clock) -> None:
    compute = Computation()
    await read(cache, b"k", compute)
    clock.now = TTL
    assert await read(cache, b"k", compute) == ("abc", "miss")


async def test_bytes_are_bounded_and_the_least_recently_used_go_first(
    cache: ResponseCache,
) -> None:
    compute = Computation()
    keys = [b"0", b"1", b"2"]
    for key in keys:
        await read(cache, key, compute)
    await read(cache, b"0", compute)
    await read(cache, b"3", compute)
    assert 0 < cache.num_bytes <= 3000
    assert (await read(cache, b"0", compute))[1] == "hit"
    assert (await read(cache, b"1", compute))[1] == "miss"
    before = cache.num_bytes
    await read(cache, b"long", Computation("x" * 100))
    assert cache.num_bytes == before, "one that is too large on its own pushes nobody out"


@pytest.fixture
async def cached_client(
    dispatcher: Any, metrics: GatewayMetrics
) -> AsyncGenerator[httpx.AsyncClient, None]:
    config = GatewayConfig(port=0, grpc_port=0, response_cache_bytes=2**20)
    service = make_service(config, dispatcher, metrics, SchedulerConfig())
    await service.start()
    await service.model(None)
    transport = httpx.ASGITransport(create_app(service, config, metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client
    await service.close()


async def ask(client: httpx.AsyncClient, **changes: Any) -> tuple[str | None, str]:
    headers = changes.pop("headers", {})
    answer = await client.post("/v1/completions", json={**GREEDY, **changes}, headers=headers)
    assert answer.status_code == 200, answer.text
    text = answer.text if changes.get("stream") else answer.json()["choices"][0]["text"]
    return answer.headers.get("x-tandem-cache"), text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "hit"),
        ({"seed": 7}, "hit"),  # greedy: nothing is drawn
        ({"user": "someone", "priority": 3}, "hit"),  # changes no token
        ({"max_tokens": 5}, "miss"),
        ({"prompt": "the quic"}, "miss"),
        ({"logprobs": 1}, "miss"),
        ({"stop": ["fox"]}, "miss"),
        ({"cache_salt": "mine"}, "miss"),
        ({"temperature": 1, "seed": 7}, "miss"),
        ({"headers": {"x-tenant": "acme"}}, "miss"),
        ({"headers": {"authorization": "Bearer k"}}, "miss"),
    ],
)
async def test_only_the_very_same_request_hits(
    cached_client: httpx.AsyncClient, changes: dict[str, Any], expected: str
) -> None:
    assert (await ask(cached_client))[0] == "miss"
    assert (await ask(cached_client, **changes))[0] == expected


async def test_a_seed_of_the_clients_own_makes_sampling_reproducible(
    cached_client: httpx.AsyncClient, dispatcher: Any
) -> None:
    assert (await ask(cached_client, temperature=1, seed=-1))[0] == "miss"
    assert (await ask(cached_client, temperature=1, seed=-1))[0] == "hit"
    for _ in range(2):
        assert (await ask(cached_client, temperature=1))[0] == "miss"
    assert len(dispatcher.requests) == 3


async def test_streams_and_whole_answers_share_it(
    cached_client: httpx.AsyncClient, dispatcher: Any
) -> None:
    _, whole = await ask(cached_client)
    first = await ask(cached_client, stream=True)
    second = await ask(cached_client, stream=True)
    assert first[0] == second[0] == "hit"
    assert "data: [DONE]" in second[1]
    assert (await ask(cached_client))[1] == whole
    assert len(dispatcher.requests) == 1


async def test_greedy_choices_of_one_request_are_computed_once(
    cached_client: httpx.AsyncClient, dispatcher: Any
) -> None:
    answer = await cached_client.post("/v1/completions", json={**GREEDY, "n": 3})
    texts = {choice["text"] for choice in answer.json()["choices"]}
    assert len(texts) == 1
    assert len(dispatcher.requests) == 1
    assert answer.headers["x-tandem-cache"] == "miss"


async def test_a_changed_model_directory_misses(
    cached_client: httpx.AsyncClient, dispatcher: Any, tmp_path: Any
) -> None:
    import shutil
    from dataclasses import replace
    from pathlib import Path

    await ask(cached_client)
    copy = shutil.copytree(Path(dispatcher.model.path), tmp_path / "model")
    dispatcher.model = replace(dispatcher.model, path=str(copy))
    assert (await ask(cached_client))[0] == "miss"


async def test_without_a_cache_there_is_no_header(client: httpx.AsyncClient) -> None:
    assert (await ask(client))[0] is None


async def test_grpc_says_it_in_the_initial_metadata(
    dispatcher: Any, metrics: GatewayMetrics
) -> None:
    config = GatewayConfig(port=0, grpc_port=0, response_cache_bytes=2**20)
    server = GatewayServer(config, dispatcher, metrics, grace_seconds=1)
    await server.start()
    try:
        await server.service.model(None)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            generate = channel.unary_stream(
                "/tandem.v1.Inference/Generate",
                inference_pb2.GenerateRequest.SerializeToString,
                inference_pb2.GenerateResponse.FromString,
            )
            said = []
            for _ in range(2):
                request = ParseDict(
                    {"text": "fox", "sampling": {"maxTokens": 2, "temperature": 0}},
                    inference_pb2.GenerateRequest(),
                )
                call = generate(request)
                said.append(dict(await call.initial_metadata()).get("x-tandem-cache"))
                assert [message async for message in call][-1].usage.completion_tokens == 2
            assert said == ["miss", "hit"]
    finally:
        await server.stop()
