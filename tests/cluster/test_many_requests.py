"""500 streams at once over HTTP, a third of them hung up on: nothing hangs, leaks or differs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from local_cluster import MakeConfig, local_cluster, until_ready
from tandem.gateway.dispatch import Dispatcher
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.server import GatewayServer
from tandem.modelfiles import BUNDLED_MODEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

STREAMS = 500
DISTINCT = 25


def make_bodies(rng: random.Random) -> list[dict[str, object]]:
    """Prompts of mixed lengths, greedy and sampled, with answers of mixed lengths."""
    bodies = []
    for index in range(DISTINCT):
        filler = "Decode is steady and prefill is bursty. " * rng.choice([0, 0, 1, 8, 40])
        bodies.append(
            {
                "model": "demo",
                "stream": True,
                "messages": [{"role": "user", "content": f"{filler}Count from {index} to 99."}],
                "max_tokens": rng.choice([1, 8, 24, 48]),
                "temperature": rng.choice([0.0, 1.0]),
                "seed": index,
            }
        )
    return bodies


async def stream_text(client: httpx.AsyncClient, body: dict[str, object], hang_up: int) -> str:
    """Return the streamed text; hang up after that many events, if not negative."""
    parts: list[str] = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if hang_up >= 0 and len(parts) >= hang_up:
                return ""
            if line == "data: [DONE]":
                return "".join(parts)
            if line:
                event = json.loads(line.removeprefix("data: "))
                parts.append(event["choices"][0]["delta"].get("content") or "")
    raise AssertionError("the stream ended without [DONE]")


@asynccontextmanager
async def gateway(
    config, controller_address: str
) -> AsyncIterator[tuple[GatewayServer, Dispatcher]]:
    metrics = GatewayMetrics()
    dispatcher = Dispatcher(config.gateway, controller_address, metrics)
    server = GatewayServer(config.gateway, dispatcher, metrics, grace_seconds=1.0)
    await server.start()
    try:
        await until_ready(dispatcher)
        yield server, dispatcher
    finally:
        await server.stop()


async def test_500_streams_with_a_third_cancelled(make_config: MakeConfig) -> None:
    rng = random.Random(5)
    bodies = make_bodies(rng)
    config = make_config(
        model={"path": str(BUNDLED_MODEL), "served_name": "demo"},
        cache={"block_size": 16, "num_blocks": 1500},
        scheduler={"max_batch_tokens": 256, "chunk_size": 128, "max_running": 64},
        worker={"local_prefill_max_tokens": 32, "peer_timeout": 10.0},
        transfer={"layers_per_group": 0},
        gateway={"port": 0, "grpc_port": 0, "worker_timeout": 10.0},
    )
    async with (
        local_cluster(config, prefill=1, decode=1) as cluster,
        gateway(config, cluster.controller_address) as (server, dispatcher),
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.port}",
            timeout=httpx.Timeout(300),
            limits=httpx.Limits(max_connections=None),
        ) as client,
    ):
        expected = [await stream_text(client, body, hang_up=-1) for body in bodies]
        assert all(expected)
        picks = [rng.randrange(DISTINCT) for _ in range(STREAMS)]
        hang_ups = [rng.randrange(12) if rng.random() < 1 / 3 else -1 for _ in picks]
        texts = await asyncio.gather(
            *(
                stream_text(client, bodies[pick], hang_up)
                for pick, hang_up in zip(picks, hang_ups, strict=True)
            )
        )
        for pick, hang_up, text in zip(picks, hang_ups, texts, strict=True):
            if hang_up < 0:
                assert text == expected[pick]
        await cluster.assert_all_free()
        assert dispatcher.in_flight == 0
