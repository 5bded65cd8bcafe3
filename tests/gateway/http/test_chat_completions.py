"""`/v1/chat/completions` as OpenAI shapes it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "hi"}]
REPLY = " the quick brown fox jumps over the lazy dog"
PATH = "/v1/chat/completions"


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": "tiny", "messages": MESSAGES, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, **fields}
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


async def test_whole_answer(client: httpx.AsyncClient, dispatcher: Any, tokenizer: Any) -> None:
    dispatcher.cached_tokens = 2
    answer = await chat(client)
    prompt = "<|bos|><|start|>user\nhi<|end|>\n<|start|>assistant\n"
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert dispatcher.requests[0].token_ids == tuple(prompt_ids)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    completion_tokens = len(dispatcher.reply) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": completion_tokens,
        "total_tokens": len(prompt_ids) + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_stream_says_role_then_text_then_reason(client: httpx.AsyncClient) -> None:
    chunks = await stream(client)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == REPLY
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)


async def test_stream_usage_comes_last_and_alone(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, stream_options={"include_usage": True}, max_tokens=3)
    *others, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in others)
    assert others[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit(client: httpx.AsyncClient, field: str) -> None:
    answer = await chat(client, **{field: 2})
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("include", "text"), [(False, " the quick brown "), (True, " the quick brown fox")]
)
async def test_stop_string_ends_the_request_everywhere(
    client: httpx.AsyncClient, dispatcher: Any, include: bool, text: str
) -> None:
    answer = await chat(client, stop=["zebra", "fox"], include_stop_str_in_output=include)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == text
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "fox")
    assert answer["usage"]["completion_tokens"] < len(dispatcher.reply)
    assert await dispatcher.cancelled.get() == dispatcher.requests[0].request_id


async def test_stop_token_is_named_and_not_said(
    client: httpx.AsyncClient, dispatcher: Any, tokenizer: Any
) -> None:
    stop = dispatcher.reply[4]
    choice = (await chat(client, stop_token_ids=[stop]))["choices"][0]
    assert choice["stop_reason"] == stop
    first = dispatcher.reply.index(stop)
    assert choice["message"]["content"] == tokenizer.decode(
        dispatcher.reply[:first], continuation=True
    )


async def test_logprobs(client: httpx.AsyncClient, dispatcher: Any, tokenizer: Any) -> None:
    answer = await chat(client, logprobs=True, top_logprobs=2, max_tokens=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    token = dispatcher.reply[0]
    text = tokenizer.token_text(token)
    assert content[0]["token"] == text
    assert content[0]["bytes"] == list(text.encode())
    assert content[0]["logprob"] == -0.5
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]
    streamed = await stream(client, logprobs=True, top_logprobs=2, max_tokens=2)
    entries = [
        entry
        for chunk in streamed
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert entries == content


async def test_logprobs_without_alternatives(client: httpx.AsyncClient) -> None:
    answer = await chat(client, logprobs=True, max_tokens=1)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_choices_differ_in_seed(client: httpx.AsyncClient, dispatcher: Any) -> None:
    answer = await chat(client, n=3, seed=2**64 - 1, max_tokens=4)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.sampling.seed for request in dispatcher.requests] == [2**64 - 1, 0, 1]
    assert len({request.request_id for request in dispatcher.requests}) == 3
    usage = answer["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["prompt_tokens"] == dispatcher.requests[0].prompt_len


async def test_streamed_choices_are_told_apart(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, n=2)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: REPLY, 1: REPLY}


async def test_token_ids_and_prompt_logprobs_on_request(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    answer = await chat(client, return_token_ids=True, prompt_logprobs=1, max_tokens=3)
    request = dispatcher.requests[0]
    assert answer["prompt_token_ids"] == list(request.token_ids)
    assert answer["choices"][0]["token_ids"] == dispatcher.reply[:3]
    entries = answer["prompt_logprobs"]
    assert entries[0] is None
    assert entries[1][str(request.token_ids[1])]["logprob"] == -0.5
    assert len(entries) == request.prompt_len
    chunks = await stream(client, return_token_ids=True, prompt_logprobs=1, max_tokens=3)
    assert chunks[0]["prompt_token_ids"] == list(request.token_ids)
    assert chunks[0]["prompt_logprobs"] == entries
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
    assert ids == dispatcher.reply[:3]


async def test_every_field_reaches_the_worker(client: httpx.AsyncClient, dispatcher: Any) -> None:
    await chat(
        client,
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2.0,
        logit_bias={"5": -100, "6": 1.5},
        seed=-1,
        stop="END",
        stop_token_ids=[9],
        ignore_eos=True,
        priority=-3,
        cache_salt="mine",
        ttft_objective=0.5,
        itl_objective=0.25,
        user="somebody",
        nobody_knows_this_field={"a": 1},
    )
    request = dispatcher.requests[0]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.top_k) == (5, 2, 7)
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.25, 0.125)
    assert sampling.repetition_penalty == 1.5
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1.0, 2.0)
    assert dict(sampling.logit_bias) == {5: -100.0, 6: 1.5}
    assert sampling.seed == 2**64 - 1
    assert (sampling.stop, sampling.stop_token_ids) == (("END",), (9,))
    assert sampling.ignore_eos
    assert (request.priority, request.cache_salt) == (-3, "mine")
    assert (request.ttft_objective, request.itl_objective) == (0.5, 0.25)


async def test_content_may_be_text_parts(client: httpx.AsyncClient, dispatcher: Any) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await chat(client, messages=[{"role": "user", "content": parts}])
    await chat(client, messages=[{"role": "user", "content": "one\ntwo"}])
    assert dispatcher.requests[0].token_ids == dispatcher.requests[1].token_ids


async def test_harmless_values_of_unsupported_fields_pass(client: httpx.AsyncClient) -> None:
    await chat(
        client, tools=[], tool_choice="none", response_format={"type": "text"}, audio=None, n=1
    )


async def test_without_seed_each_request_draws_one(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    await chat(client, max_tokens=1)
    await chat(client, max_tokens=1)
    first, second = (request.sampling.seed for request in dispatcher.requests)
    assert first != second


async def test_grouping_of_tokens_changes_nothing(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    fields = {"stop": "fox", "logprobs": True, "return_token_ids": True, "seed": 1}
    one_by_one = await chat(client, **fields)
    dispatcher.tokens_per_event = 64
    at_once = await chat(client, **fields)
    assert one_by_one["choices"] == at_once["choices"]
    assert one_by_one["usage"] == at_once["usage"]
