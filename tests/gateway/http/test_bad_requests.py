"""Bad input over HTTP: status, OpenAI's error shape, the field by name; no worker is bothered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tandem.core.errors import (
    DeadlineExceededError,
    OverloadedError,
    TandemError,
    UnavailableError,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after its shape is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


OUT_OF_RANGE: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -3}, "max_tokens", "at least 1"),
    ({"temperature": -0.1}, "temperature", "between 0 and 2"),
    ({"temperature": 2.5}, "temperature", "between 0 and 2"),
    ({"top_p": 0}, "top_p", "in (0, 1]"),
    ({"top_p": 1.01}, "top_p", "in (0, 1]"),
    ({"top_k": -2}, "top_k", "positive integer"),
    ({"min_p": 2}, "min_p", "between 0 and 1"),
    ({"n": 5}, "n", "between 1 and 4"),
    ({"n": 0}, "n", "between 1 and 4"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "between -2 and 2"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "max_tokens (4)"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ["x", ""]}, "stop", "non-empty"),
    ({"stop": "x" * 1025}, "stop", "1024"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "at most 64"),
    ({"stop_token_ids": [320]}, "stop_token_ids", "[0, 320)"),
    ({"logit_bias": {"320": 1}}, "logit_bias", "[0, 320)"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]", "between -100 and 100"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "between 0 and 20"),
    ({"priority": 2**31}, "priority", "32-bit"),
    ({"ttft_objective": -1}, "ttft_objective", "0 or more"),
    ({"itl_objective": -0.5}, "itl_objective", "0 or more"),
]
WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"stream": "yes"}, "stream"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop[0]"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "much"}}, "logit_bias[5]"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"model": 5}, "model"),
    ({"stream_options": 5, "stream": True}, "stream_options"),
    ({"n": 10**30}, "n"),
]
OF_THE_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0]"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"guided_json": {}}, "guided_json"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
]
OF_THE_COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [320]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ["x"] * 300, "n": 4}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "param", "allowed"), OUT_OF_RANGE)
async def test_out_of_range(
    client: httpx.AsyncClient,
    dispatcher: Any,
    path: str,
    fields: dict[str, Any],
    param: str,
    allowed: str,
) -> None:
    body = {"messages": MESSAGES, "prompt": "hi", **fields}
    error = error_of(await client.post(path, json=body), 400)
    assert error["param"] == param
    assert allowed in error["message"]
    assert error["type"] == "invalid_request_error"
    assert dispatcher.requests == []


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "param"), WRONG_TYPES)
async def test_wrong_types(
    client: httpx.AsyncClient, dispatcher: Any, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": MESSAGES, "prompt": "hi", **fields}
    error = error_of(await client.post(path, json=body), 400)
    assert error["param"] == param
    assert param.split("[")[0].split(".")[0] in error["message"]
    assert dispatcher.requests == []


@pytest.mark.parametrize(("fields", "param"), OF_THE_CHAT)
async def test_bad_chats(
    client: httpx.AsyncClient, dispatcher: Any, fields: dict[str, Any], param: str
) -> None:
    error = error_of(await client.post(CHAT, json={"messages": MESSAGES, **fields}), 400)
    assert error["param"] == param
    assert dispatcher.requests == []


@pytest.mark.parametrize(("fields", "param"), OF_THE_COMPLETION)
async def test_bad_completions(
    client: httpx.AsyncClient, dispatcher: Any, fields: dict[str, Any], param: str
) -> None:
    error = error_of(await client.post(COMPLETIONS, json={"prompt": "hi", **fields}), 400)
    assert error["param"] == param
    assert dispatcher.requests == []


async def test_missing_fields_are_named(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(CHAT, json={"model": "tiny"}), 400)
    assert (error["param"], error["code"]) == ("messages", "missing_field")
    error = error_of(await client.post(COMPLETIONS, json={}), 400)
    assert (error["param"], error["code"]) == ("prompt", "missing_field")


async def test_unknown_model(client: httpx.AsyncClient) -> None:
    body = {"model": "gpt-9", "messages": MESSAGES}
    error = error_of(await client.post(CHAT, json=body), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt-9" in error["message"]
    assert "tiny" in error["message"]


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"prompt": [5] * 70}, ("70", "64")),
        ({"prompt": [5] * 64}, ("64",)),
        ({"prompt": [5] * 60, "max_tokens": 5}, ("64", "65", "60", "5")),
    ],
)
async def test_lengths_over_the_context_are_named(
    client: httpx.AsyncClient, fields: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    error = error_of(await client.post(COMPLETIONS, json=fields), 400)
    assert error["code"] == "context_length_exceeded"
    for number in numbers:
        assert number in error["message"]


async def test_default_length_is_capped_where_an_explicit_one_is_refused(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": [5] * 60})
    assert response.status_code == 200
    assert dispatcher.requests[0].sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (b'{"prompt": ', "JSON"),
        (b"", "empty"),
        (b"[1, 2]", "object"),
        (b'"text"', "object"),
        (b'{"prompt": NaN}', "JSON"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "JSON"),
        (b"[" * 2000, "JSON"),
    ],
)
async def test_malformed_bodies(client: httpx.AsyncClient, body: bytes, hint: str) -> None:
    error = error_of(await client.post(COMPLETIONS, content=body), 400)
    assert error["code"] == "invalid_json"
    assert hint in error["message"]


async def test_body_over_the_limit_by_its_header(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post(COMPLETIONS, content=b" " * 4097), 413)
    assert error["code"] == "request_too_large"
    assert "4096" in error["message"]


async def test_body_over_the_limit_without_a_length(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1024
            yield b" " * 1024

    error_of(await client.post(COMPLETIONS, content=endless()), 413)
    assert sent <= 8192


async def test_body_at_the_limit_is_read(client: httpx.AsyncClient) -> None:
    body = b'{"prompt": "a", "max_tokens": 1'
    padded = body + b" " * (4095 - len(body)) + b"}"
    assert (await client.post(COMPLETIONS, content=padded)).status_code == 200


async def test_unknown_url_and_wrong_method(client: httpx.AsyncClient) -> None:
    error = error_of(await client.get("/v1/nothing"), 404)
    assert error["code"] == "unknown_url"
    response = await client.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (OverloadedError("full", retry_after=2.3), 429, "rate_limit_error"),
        (UnavailableError("nobody"), 503, "service_unavailable_error"),
        (DeadlineExceededError("late"), 504, "timeout_error"),
        (TandemError("broken"), 500, "internal_server_error"),
        (ValueError("a bug with secrets"), 500, "internal_server_error"),
    ],
)
async def test_failures_before_the_first_token_have_their_status(
    client: httpx.AsyncClient,
    dispatcher: Any,
    failure: Exception,
    status: int,
    kind: str,
    stream: bool,
) -> None:
    dispatcher.errors[0] = failure
    response = await client.post(CHAT, json={"messages": MESSAGES, "stream": stream})
    error = error_of(response, status)
    assert error["type"] == kind
    assert "secrets" not in error["message"]
    if status == 429:
        assert response.headers["retry-after"] == "3"


async def test_a_failing_choice_fails_the_whole_answer(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    dispatcher.errors[3] = UnavailableError("nobody")
    response = await client.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2})
    error_of(response, 503)
    assert dispatcher.active == set()


async def test_without_chat_template_chats_are_refused(
    client: httpx.AsyncClient, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    served = await service.model(None)
    monkeypatch.setattr(service._loader, "_loaded", replace(served, chat_template=None))
    error = error_of(await client.post(CHAT, json={"messages": MESSAGES}), 400)
    assert error["code"] == "no_chat_template"
