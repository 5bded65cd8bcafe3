"""Probes, models, tokenize, request ids and metrics over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

import tandem
from tandem.core.config import GatewayConfig
from tandem.gateway.http.app import create_app
from tandem.gateway.interfaces import HandoverTimes, MetricsTarget, StageTimes
from tandem.gateway.service import InferenceService


async def test_ready_follows_the_workers_and_health_does_not(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    assert (await client.get("/ready")).status_code == 200
    dispatcher.ready = False
    response = await client.get("/ready")
    assert response.status_code == 503
    assert "decode worker" in response.json()["reason"]
    assert (await client.get("/health")).status_code == 200


async def test_before_the_model_is_known(
    dispatcher: Any, config: GatewayConfig, metrics: Any
) -> None:
    info, dispatcher.model = dispatcher.model, None
    service = InferenceService(dispatcher, metrics)
    transport = httpx.ASGITransport(create_app(service, config, metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/v1/models")).json()["data"] == []
        response = await client.post("/v1/completions", json={"prompt": "a"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "model_not_ready"
        assert response.headers["retry-after"]
        dispatcher.model = info
        response = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert response.status_code == 200


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 64)
    assert (await client.get("/v1/models/tiny")).json() == model
    missing = await client.get("/v1/models/some/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": tandem.__version__}


async def test_tokenize_and_back(client: httpx.AsyncClient, tokenizer: Any) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "the fox"})).json()
    assert answer["tokens"] == tokenizer.encode("the fox")
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 64
    body = {"prompt": "the fox", "add_special_tokens": False, "return_token_strs": True}
    plain = (await client.post("/tokenize", json=body)).json()
    assert plain["tokens"] == answer["tokens"][1:]
    assert "".join(plain["token_strs"]) == "the fox"
    back = await client.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": "<|bos|>the fox"}


async def test_tokenize_a_chat_as_the_model_sees_it(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    messages = [{"role": "developer", "content": "short"}, {"role": "user", "content": "hi"}]
    answer = (await client.post("/tokenize", json={"messages": messages})).json()
    await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert answer["tokens"] == list(dispatcher.requests[0].token_ids)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_bad_texts(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("sent", "kept"), [("abc-123", True), ("x" * 129, False), ("with space", False), ("", False)]
)
async def test_request_ids(
    client: httpx.AsyncClient, dispatcher: Any, sent: str, kept: bool
) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    headers = {"X-Request-Id": sent}
    response = await client.post("/v1/completions", json=body, headers=headers)
    answered = response.headers["x-request-id"]
    assert (answered == sent) is kept
    assert len(answered) in (len(sent), 32)
    assert dispatcher.requests[0].request_id.startswith(answered)


async def test_the_tenant_is_what_the_header_says(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for headers in ({"X-Tenant": "acme"}, {}):
        await client.post("/v1/completions", json=body, headers=headers)
    assert [request.tenant for request in dispatcher.requests] == ["acme", ""]
    refused = await client.post("/v1/completions", json=body, headers={"X-Tenant": "x" * 257})
    assert refused.json()["error"]["param"] == "tenant"


async def test_the_same_request_id_twice_is_two_requests(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    for _ in range(2):
        await client.post(
            "/v1/completions",
            json={"prompt": "a", "max_tokens": 1},
            headers={"X-Request-Id": "same"},
        )
    first, second = (request.request_id for request in dispatcher.requests)
    assert first != second


async def test_metrics_tell_what_happened(client: httpx.AsyncClient, dispatcher: Any) -> None:
    dispatcher.cached_tokens = 2
    await client.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4})
    await client.post("/v1/completions", json={"prompt": []})
    await client.get("/no/such/path")
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = set(response.text.splitlines())
    endpoint = 'tandem_gateway_requests_total{endpoint="/v1/completions",outcome='
    for line in (
        endpoint + '"ok"} 1.0',
        endpoint + '"client_error"} 1.0',
        'tandem_gateway_requests_total{endpoint="unmatched",outcome="client_error"} 1.0',
        "tandem_gateway_prompt_tokens_total 3.0",
        "tandem_gateway_completion_tokens_total 4.0",
        "tandem_gateway_cached_prompt_tokens_total 2.0",
        "tandem_gateway_time_to_first_token_seconds_count 1.0",
        "tandem_gateway_inter_token_latency_seconds_count 3.0",
        "tandem_gateway_end_to_end_latency_seconds_count 1.0",
        'tandem_gateway_requests_in_flight{api="http"} 0.0',
    ):
        assert line in lines


async def test_stage_times_are_observed_and_transfer_only_where_there_was_one(
    client: httpx.AsyncClient, dispatcher: Any, metrics: Any
) -> None:
    body = {"prompt": "a", "max_tokens": 2}
    for worker, handover in (("prefill-0", HandoverTimes(0.125, 0.0625, 1024)), ("", None)):
        dispatcher.stages, dispatcher.handover = StageTimes(0.5, 0.25, worker), handover
        await client.post("/v1/completions", json=body)
    sums = {
        name: metrics.registry.get_sample_value(f"tandem_gateway_{name}_seconds_sum")
        for name in ("queue", "prefill", "transfer", "exposed_transfer")
    }
    assert sums == {"queue": 1.0, "prefill": 0.5, "transfer": 0.125, "exposed_transfer": 0.0625}
    assert metrics.registry.get_sample_value("tandem_gateway_kv_transfer_bytes_total") == 1024


async def test_metrics_targets_are_http_service_discovery(
    service: InferenceService, config: GatewayConfig, metrics: Any
) -> None:
    async def targets() -> list[MetricsTarget]:
        return [MetricsTarget("10.0.0.1:9100", "decode-0", "decode")]

    transport = httpx.ASGITransport(create_app(service, config, metrics, targets))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        assert (await client.get("/metrics/targets")).json() == [
            {"targets": ["10.0.0.1:9100"], "labels": {"worker": "decode-0", "role": "decode"}}
        ]
