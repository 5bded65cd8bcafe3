"""The gateway's edges in front of real workers: HTTP and gRPC, from text to text."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from local_cluster import LocalCluster, MakeConfig, local_cluster
from tandem.gateway.dispatch import Dispatcher
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.server import GatewayServer
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc

pytestmark = pytest.mark.cluster

PROMPT = list(range(3, 60))
BODY = {
    "prompt": PROMPT,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
}


@pytest.fixture
def text_model(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer of one token per byte."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_llama, directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    return directory


@asynccontextmanager
async def gateway(
    make_config: MakeConfig, model: Path, **workers: int
) -> AsyncIterator[tuple[LocalCluster, GatewayServer, httpx.AsyncClient]]:
    """A cluster with a gateway in front, ready, and an HTTP client of it."""
    config = make_config(model, gateway={"port": 0, "grpc_port": 0})
    async with local_cluster(config, **workers) as cluster:
        metrics = GatewayMetrics()
        dispatcher = Dispatcher(config.gateway, cluster.controller_address, metrics)
        server = GatewayServer(config.gateway, dispatcher, metrics, grace_seconds=2)
        await server.start()
        url = f"http://127.0.0.1:{server.port}"
        try:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                async with asyncio.timeout(30):
                    while (await client.get("/ready")).status_code != 200:
                        await asyncio.sleep(0.02)
                yield cluster, server, client
        finally:
            await server.stop()


async def stream(client: httpx.AsyncClient, max_tokens: int) -> list[int]:
    """The token ids of one stream, which must end well."""
    response = await client.post("/v1/completions", json={**BODY, "max_tokens": max_tokens})
    assert response.text.endswith("data: [DONE]\n\n"), response.text[-300:]
    events = [json.loads(frame[6:]) for frame in response.text.split("\n\n")[:-2]]
    return [token for event in events for token in event["choices"][0]["token_ids"]]


async def test_both_edges_say_the_same(make_config: MakeConfig, text_model: Path) -> None:
    async with gateway(make_config, text_model) as (cluster, server, client):
        tokens = await stream(client, 20)
        whole = await client.post(
            "/v1/completions", json={**BODY, "stream": False, "max_tokens": 20, "n": 2}
        )
        assert [choice["token_ids"] for choice in whole.json()["choices"]] == [tokens, tokens]
        cached = whole.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert 0 < cached < len(PROMPT)
        sampling = pb.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            responses = [response async for response in stub.Generate(request)]
        assert [token for response in responses for token in response.token_ids] == tokens
        assert "".join(r.text for r in responses) == whole.json()["choices"][0]["text"]
        await cluster.assert_all_free()


async def test_stop_strings_and_leaving_clients_free_their_blocks(
    make_config: MakeConfig, text_model: Path
) -> None:
    async with gateway(make_config, text_model) as (cluster, _, client):
        text = "".join(chr(c) for c in range(97, 122))
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0}
        answer = (await client.post("/v1/chat/completions", json={**body, "max_tokens": 30})).json()
        said = answer["choices"][0]["message"]["content"]
        stopped = await client.post("/v1/chat/completions", json={**body, "stop": said[5:7]})
        assert stopped.json()["choices"][0]["stop_reason"] == said[5:7]
        for _ in range(3):
            request = {**BODY, "max_tokens": 500}
            async with client.stream("POST", "/v1/completions", json=request) as response:
                await anext(response.aiter_bytes())
        await cluster.assert_all_free()


async def test_bad_requests_reach_no_block(make_config: MakeConfig, text_model: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"prompt": [5] * 5000},
        {"prompt": [10**6]},
        {"prompt": []},
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"n": 10**6},
        {"model": "other"},
        {"stop": ["x"] * 99},
        {"max_tokens": "many"},
    ]
    async with gateway(make_config, text_model) as (cluster, _, client):
        for fields in bad:
            response = await client.post("/v1/completions", json={**BODY, **fields})
            assert response.status_code in (400, 404), fields
            assert response.json()["error"]["message"]
        await cluster.assert_all_free()


async def test_streams_outlive_a_killed_decode_worker(
    make_config: MakeConfig, text_model: Path
) -> None:
    async with gateway(make_config, text_model, decode=2) as (cluster, _, client):
        expected = await stream(client, 150)
        streams = [asyncio.create_task(stream(client, 150)) for _ in range(8)]
        async with asyncio.timeout(20):
            while (await cluster.status("decode-0")).running < 2:
                await asyncio.sleep(0)
        cluster.workers["decode-0"].kill()
        assert await asyncio.gather(*streams) == [expected] * 8
        await cluster.assert_all_free(["decode-1", "prefill-0"])
