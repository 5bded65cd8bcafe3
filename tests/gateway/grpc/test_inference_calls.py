"""`tandem.v1.Inference` through a real channel."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem.core.errors import (
    DeadlineExceededError,
    OverloadedError,
    TandemError,
    UnavailableError,
)
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc

REPLY = " the quick brown fox jumps over the lazy dog"
GENERATE = "/tandem.v1.Inference/Generate"


@pytest.fixture
def stub(channel: Any) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)


def ids(*token_ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=token_ids)


async def collect(call: Any) -> list[pb.GenerateResponse]:
    return [response async for response in call]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if hasattr(call, "__await__") else collect(call))
    return caught.value


def trailer(error: grpc.aio.AioRpcError, key: str) -> Any:
    return dict(error.trailing_metadata() or ()).get(key)


async def test_generate_streams_tokens_text_and_usage(
    stub: Any, dispatcher: Any, tokenizer: Any
) -> None:
    dispatcher.cached_tokens = 2
    request = pb.GenerateRequest(model="tiny", text="fox", request_id="mine")
    responses = await collect(stub.Generate(request))
    assert {response.request_id for response in responses} == {"mine"}
    assert "".join(response.text for response in responses) == REPLY
    tokens = [token for response in responses for token in response.token_ids]
    assert tokens == [*dispatcher.reply, 1]
    assert dispatcher.requests[0].token_ids == tuple(tokenizer.encode("fox"))
    *others, last = responses
    assert all(not response.HasField("usage") for response in others)
    assert all(response.finish_reason == pb.FINISH_REASON_UNSPECIFIED for response in others)
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.usage.prompt_tokens == len(tokenizer.encode("fox"))
    assert last.usage.completion_tokens == len(tokens)
    assert last.usage.cached_tokens == 2
    assert last.stop_reason == ""


async def test_every_parameter_reaches_the_worker(stub: Any, dispatcher: Any) -> None:
    sampling = pb.SamplingParams(
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={5: -100},
        seed=2**64 - 1,
        logprobs=1,
        prompt_logprobs=0,
        stop=["END"],
        stop_token_ids=[9],
        ignore_eos=True,
        include_stop_str_in_output=True,
    )
    request = pb.GenerateRequest(
        token_ids=ids(5, 6),
        sampling=sampling,
        priority=-2,
        cache_salt="mine",
        tenant="acme",
        ttft_objective=0.5,
        itl_objective=0.25,
    )
    first, *_ = await collect(stub.Generate(request))
    sent = dispatcher.requests[0]
    params = sent.sampling
    assert sent.token_ids == (5, 6)
    assert (sent.priority, sent.cache_salt) == (-2, "mine")
    assert (sent.tenant, sent.ttft_objective, sent.itl_objective) == ("acme", 0.5, 0.25)
    for name in ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
                 "repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs",
                 "prompt_logprobs", "ignore_eos", "include_stop_str_in_output"):  # fmt: skip
        assert getattr(params, name) == getattr(sampling, name), name
    assert dict(params.logit_bias) == {5: -100.0}
    assert (params.stop, params.stop_token_ids) == (("END",), (9,))
    assert first.logprobs[0].chosen.logprob == -0.5
    assert len(first.logprobs[0].top) == 1
    assert not first.prompt_logprobs[0].HasField("chosen")
    assert first.prompt_logprobs[1].chosen.token_id == 6


async def test_absent_parameters_take_the_defaults(stub: Any, dispatcher: Any) -> None:
    await collect(stub.Generate(pb.GenerateRequest(token_ids=ids(5))))
    params = dispatcher.requests[0].sampling
    assert (params.max_tokens, params.temperature, params.logprobs) == (63, 1.0, None)


async def test_stop_string_is_named(stub: Any, dispatcher: Any) -> None:
    sampling = pb.SamplingParams(stop=["fox"])
    responses = await collect(stub.Generate(pb.GenerateRequest(text="a", sampling=sampling)))
    assert "".join(response.text for response in responses) == " the quick brown "
    assert responses[-1].stop_reason == "fox"
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    assert await dispatcher.cancelled.get() == dispatcher.requests[0].request_id


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"sampling": {"max_tokens": 0}}, "max_tokens", "at least 1"),
    ({"sampling": {"temperature": -1}}, "temperature", "between 0 and 2"),
    ({"sampling": {"temperature": float("nan")}}, "temperature", "between 0 and 2"),
    ({"sampling": {"top_p": 0}}, "top_p", "in (0, 1]"),
    ({"sampling": {"top_p": 1.5}}, "top_p", "in (0, 1]"),
    ({"sampling": {"top_k": -2}}, "top_k", "positive"),
    ({"sampling": {"min_p": -1}}, "min_p", "between 0 and 1"),
    ({"sampling": {"repetition_penalty": 0}}, "repetition_penalty", "greater than 0"),
    ({"sampling": {"logprobs": 21}}, "logprobs", "between 0 and 20"),
    ({"sampling": {"stop": ["x"] * 17}}, "stop", "at most 16"),
    ({"sampling": {"stop": [""]}}, "stop", "non-empty"),
    ({"sampling": {"stop_token_ids": [320]}}, "stop_token_ids", "[0, 320)"),
    ({"sampling": {"logit_bias": {320: 1}}}, "logit_bias", "[0, 320)"),
    ({"sampling": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens", "max_tokens (8)"),
    ({"token_ids": pb.TokenIds(ids=[320])}, "token_ids", "[0, 320)"),
    ({"token_ids": pb.TokenIds()}, "token_ids", "empty"),
    ({"token_ids": pb.TokenIds(ids=[5] * 70)}, "token_ids", "70"),
    ({"request_id": "x" * 129}, "request_id", "128"),
]


@pytest.mark.parametrize(("fields", "param", "allowed"), BAD)
async def test_bad_requests_are_invalid_arguments(
    stub: Any, dispatcher: Any, fields: dict[str, Any], param: str, allowed: str
) -> None:
    fields = dict(fields)
    if "token_ids" not in fields:
        fields["text"] = "hi"
    if "sampling" in fields:
        fields["sampling"] = pb.SamplingParams(**fields["sampling"])
    error = await failure(stub.Generate(pb.GenerateRequest(**fields)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert allowed in (error.details() or "")
    assert trailer(error, "error-param") == param
    assert dispatcher.requests == []


async def test_lengths_over_the_context_are_named(stub: Any) -> None:
    error = await failure(
        stub.Generate(
            pb.GenerateRequest(token_ids=ids(*[5] * 60), sampling=pb.SamplingParams(max_tokens=5))
        )
    )
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert trailer(error, "error-code") == "context_length_exceeded"
    for number in ("64", "65", "60"):
        assert number in (error.details() or "")


async def test_no_prompt(stub: Any) -> None:
    error = await failure(stub.Generate(pb.GenerateRequest()))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_model(stub: Any) -> None:
    for call in (
        stub.Generate(pb.GenerateRequest(model="gpt-9", text="a")),
        stub.Tokenize(pb.TokenizeRequest(model="gpt-9", text="a")),
        stub.Detokenize(pb.DetokenizeRequest(model="gpt-9", token_ids=[5])),
    ):
        error = await failure(call)
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert "gpt-9" in (error.details() or "")


@pytest.mark.parametrize(
    "data",
    [
        pb.GenerateRequest(text="aaaa").SerializeToString().replace(b"aaaa", b"\xff\xfeaa"),
        b"\x0a\xff\xff\xff",
    ],
)
async def test_invalid_utf8_and_damaged_messages(channel: Any, data: bytes) -> None:
    error = await failure(channel.unary_stream(GENERATE)(data))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "tandem.v1.GenerateRequest" in (error.details() or "")


async def test_unknown_proto_fields_are_ignored(channel: Any) -> None:
    data = pb.GenerateRequest(text="a").SerializeToString() + b"\xfa\x3e\x01x"
    responses = await collect(channel.unary_stream(GENERATE)(data))
    assert responses


async def test_message_over_the_size_limit(stub: Any) -> None:
    error = await failure(stub.Generate(pb.GenerateRequest(text="a" * 5000)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (OverloadedError("full", retry_after=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (UnavailableError("nobody"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceededError("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (TandemError("broken"), grpc.StatusCode.INTERNAL),
        (ValueError("a bug with secrets"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_failures_have_their_codes(
    stub: Any, dispatcher: Any, raised: Exception, code: grpc.StatusCode, position: int
) -> None:
    dispatcher.errors[position] = raised
    error = await failure(stub.Generate(pb.GenerateRequest(text="a")))
    assert error.code() == code
    assert "secrets" not in (error.details() or "")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert trailer(error, "retry-after-ms") == "2500"


async def test_cancelling_frees_everything(stub: Any, dispatcher: Any) -> None:
    dispatcher.pause_at = 2
    call = stub.Generate(pb.GenerateRequest(text="a"))
    await call.read()
    await dispatcher.paused.wait()
    call.cancel()
    assert await dispatcher.cancelled.get() == dispatcher.requests[0].request_id
    assert await call.code() == grpc.StatusCode.CANCELLED


async def test_the_deadline_frees_everything(stub: Any, dispatcher: Any) -> None:
    dispatcher.pause_at = 2
    error = await failure(stub.Generate(pb.GenerateRequest(text="a"), timeout=0.5))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await dispatcher.cancelled.get() == dispatcher.requests[0].request_id


async def test_tokenize_and_back(stub: Any, tokenizer: Any) -> None:
    answer = await stub.Tokenize(pb.TokenizeRequest(text="the fox"))
    assert list(answer.token_ids) == tokenizer.encode("the fox")
    assert answer.max_model_len == 64
    plain = await stub.Tokenize(pb.TokenizeRequest(text="the fox", add_special_tokens=False))
    assert list(plain.token_ids) == list(answer.token_ids)[1:]
    back = await stub.Detokenize(pb.DetokenizeRequest(token_ids=answer.token_ids))
    assert back.text == "<|bos|>the fox"
    error = await failure(stub.Detokenize(pb.DetokenizeRequest(token_ids=[320])))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_list_models(stub: Any) -> None:
    answer = await stub.ListModels(pb.ListModelsRequest())
    assert [(model.id, model.max_model_len) for model in answer.models] == [("tiny", 64)]


async def test_health_follows_readiness(channel: Any, dispatcher: Any) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    status = health_pb2.HealthCheckResponse
    for name in ("", "tandem.v1.Inference"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == status.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == status.SERVING
    dispatcher.ready = False
    assert (await watch.read()).status == status.NOT_SERVING
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == status.NOT_SERVING
    watch.cancel()
    error = await failure(health.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(channel: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="tandem.v1.Inference"),
    ]
    listed, described = [r async for r in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"tandem.v1.Inference", "grpc.health.v1.Health"} <= names
    files = described.file_descriptor_response.file_descriptor_proto
    pool = descriptor_pool.DescriptorPool()
    for data in files:
        pool.AddSerializedFile(data)
    service = pool.FindServiceByName("tandem.v1.Inference")
    assert {method.name for method in service.methods} == {
        "Generate", "Tokenize", "Detokenize", "ListModels",
    }  # fmt: skip


async def test_calls_are_counted(stub: Any, dispatcher: Any, metrics: Any) -> None:
    await collect(stub.Generate(pb.GenerateRequest(text="a")))
    await failure(stub.Generate(pb.GenerateRequest()))
    dispatcher.pause_at = 1
    call = stub.Generate(pb.GenerateRequest(text="a"))
    await call.read()
    call.cancel()
    await dispatcher.cancelled.get()

    def count(outcome: str) -> Any:
        labels = {"endpoint": "tandem.v1.Inference/Generate", "outcome": outcome}
        return metrics.registry.get_sample_value("tandem_gateway_requests_total", labels)

    async with asyncio.timeout(10):
        while count("cancelled") is None:
            await asyncio.sleep(0)
    assert [count(outcome) for outcome in ("ok", "client_error", "cancelled")] == [1, 1, 1]
