"""Several gateways on one port: each serves, and each can be asked alone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

import httpx
import pytest

from free_ports import free_port
from tandem.core.config import GatewayConfig
from tandem.core.errors import ConfigError
from tandem.gateway.metrics import GatewayMetrics, TokenGaps
from tandem.gateway.server import GatewayServer, bind

from .conftest import FakeDispatcher

CONNECTIONS = 64


@pytest.fixture
async def pair(dispatcher: FakeDispatcher) -> AsyncGenerator[tuple[GatewayServer, ...], None]:
    config = GatewayConfig(port=free_port(), grpc_port=free_port(), processes=2)
    servers = [
        GatewayServer(config, dispatcher, GatewayMetrics(), grace_seconds=1, own_port=free_port())
        for _ in range(2)
    ]
    for server in servers:
        await server.start()
        await server.service.model(None)
    yield tuple(servers)
    await asyncio.gather(*(server.stop() for server in servers))


async def test_connections_are_spread_and_each_gateway_counts_its_own(
    pair: tuple[GatewayServer, ...],
) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    for _ in range(CONNECTIONS):
        async with httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{pair[0].port}/v1/completions"
            assert (await client.post(url, json=body)).status_code == 200
    counts = []
    async with httpx.AsyncClient() as client:
        for server in pair:
            text = (await client.get(f"http://127.0.0.1:{server._own_port}/metrics")).text
            counts.append(
                sum(map(float, re.findall(r"^tandem_gateway_requests_total{.*} (.*)$", text, re.M)))
            )
    assert sum(counts) == CONNECTIONS
    assert min(counts) > 0


async def test_a_busy_port_of_its_own_is_told_and_frees_the_shared_one(
    dispatcher: FakeDispatcher,
) -> None:
    with bind("127.0.0.1", 0) as busy:
        own_port = busy.getsockname()[1]
        config = GatewayConfig(port=free_port(), grpc_port=0, processes=2)
        server = GatewayServer(config, dispatcher, GatewayMetrics(), own_port=own_port)
        with pytest.raises(ConfigError, match=f"metrics_port: .*{own_port}.*--metrics-port"):
            await server.start()
    bind("127.0.0.1", config.port).close()


def test_token_gaps_read_as_a_cumulative_histogram() -> None:
    gaps = TokenGaps("gap_seconds", "Gaps.")
    for seconds in (0.0005, 0.001, 0.015, 0.015, 11.0):
        gaps.observe(seconds)
    (family,) = gaps.collect()
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name == "gap_seconds_bucket"}
    assert (buckets["0.001"], buckets["0.01"], buckets["0.02"]) == (2, 2, 4)
    assert (buckets["10.0"], buckets["+Inf"]) == (4, 5)
    values = {sample.name: sample.value for sample in family.samples}
    assert values["gap_seconds_count"] == 5
    assert values["gap_seconds_sum"] == pytest.approx(11.0315)
