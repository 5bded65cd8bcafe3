"""A whole gateway on real ports: standard clients, busy ports, a graceful stop."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import grpc
import httpx
import openai
import pytest
import uvloop

from tandem.core.config import GatewayConfig
from tandem.core.errors import ConfigError, OverloadedError
from tandem.gateway.server import GatewayServer
from tandem.v1 import inference_pb2, inference_pb2_grpc

MESSAGES: Any = [{"role": "user", "content": "hi"}]
REPLY = " the quick brown fox jumps over the lazy dog"


@pytest.fixture
async def sdk(server: GatewayServer) -> Any:
    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    )
    async with client:
        yield client


async def test_openai_sdk_chat(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1, extra_body={"top_k": 3}
    )
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_openai_sdk_stream(sdk: openai.AsyncOpenAI) -> None:
    chunks = [
        chunk
        async for chunk in await sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    ]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    assert chunks[-1].usage is not None


async def test_openai_sdk_completions_and_models(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model="tiny", prompt=["a", "b"], logprobs=1, echo=True)
    assert [choice.text[0] for choice in answer.choices] == ["a", "b"]
    assert [model.id async for model in sdk.models.list()] == ["tiny"]
    assert (await sdk.models.retrieve("tiny")).id == "tiny"


async def test_openai_sdk_errors(sdk: openai.AsyncOpenAI, dispatcher: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    dispatcher.errors[0] = OverloadedError("full")
    with pytest.raises(openai.RateLimitError) as full:
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES)
    assert full.value.response.headers["retry-after"] == "1"
    dispatcher.errors = {3: OverloadedError("full")}
    with pytest.raises(openai.APIError, match="full"):
        async for _ in await sdk.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True
        ):
            pass


async def test_busy_ports_are_named_with_their_flags(
    server: GatewayServer, dispatcher: Any, metrics: Any
) -> None:
    busy_http = GatewayServer(GatewayConfig(port=server.port, grpc_port=0), dispatcher, metrics)
    with pytest.raises(ConfigError, match=rf":{server.port} .*--port"):
        await busy_http.start()
    busy_grpc = GatewayServer(
        GatewayConfig(port=0, grpc_port=server.grpc_port), dispatcher, metrics
    )
    with pytest.raises(ConfigError, match=rf":{server.grpc_port};.*--grpc-port"):
        await busy_grpc.start()


async def test_a_stop_lets_streams_finish_and_takes_no_new_ones(
    dispatcher: Any, metrics: Any
) -> None:
    config = GatewayConfig(port=0, grpc_port=0)
    server = GatewayServer(config, dispatcher, metrics, grace_seconds=20)
    await server.start()
    dispatcher.pause_at = 2
    base_url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
        body = {"messages": MESSAGES, "stream": True}
        http_call = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await dispatcher.paused.wait()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            grpc_call = aiter(stub.Generate(inference_pb2.GenerateRequest(text="a")))
            await anext(grpc_call)
            stop = asyncio.create_task(server.stop())
            await _refused(server.port)
            assert not stop.done()
            dispatcher.resume.set()
            assert (await http_call).text.endswith("data: [DONE]\n\n")
            responses = [response async for response in grpc_call]
            assert responses[-1].usage.completion_tokens
            await stop
    assert dispatcher.closed


async def _refused(port: int) -> None:
    """Wait until the port takes no connection."""
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                continue  # it was still in the backlog when the port closed
            writer.close()
            await writer.wait_closed()


async def test_streams_that_do_not_finish_are_cut(dispatcher: Any, metrics: Any) -> None:
    config = GatewayConfig(port=0, grpc_port=0)
    server = GatewayServer(config, dispatcher, metrics, grace_seconds=0.2)
    await server.start()
    dispatcher.pause_at = 2
    base_url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=base_url, timeout=30) as client:
        body = {"messages": MESSAGES, "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            await dispatcher.paused.wait()
            await server.stop()
            with pytest.raises(httpx.RemoteProtocolError):
                await response.aread()
    assert await dispatcher.cancelled.get() == dispatcher.requests[0].request_id


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program(
    dispatcher: Any, config: GatewayConfig, metrics: Any, number: signal.Signals
) -> None:
    """Under uvloop, as `run` has it; both edges answer there."""
    server = GatewayServer(config, dispatcher, metrics, grace_seconds=5)

    async def main() -> None:
        program = asyncio.create_task(server.run_async())
        while not server.grpc_port:
            await asyncio.sleep(0)
        url = f"http://127.0.0.1:{server.port}/v1/completions"
        async with httpx.AsyncClient(timeout=30) as client:
            assert (await client.post(url, json={"prompt": "a"})).status_code == 200
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            request = inference_pb2.GenerateRequest(text="a")
            assert [response async for response in stub.Generate(request)]
        os.kill(os.getpid(), number)
        await program

    uvloop.run(main())
    assert dispatcher.closed
