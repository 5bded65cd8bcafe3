"""`/v1/completions` as OpenAI shapes it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

PATH = "/v1/completions"


async def complete(client: httpx.AsyncClient, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = await client.post(PATH, json={"model": "tiny", "prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(PATH, json={"prompt": prompt, "stream": True, **fields})
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""], response.text
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


async def test_text_prompt_gets_special_tokens_and_sixteen_by_default(
    client: httpx.AsyncClient, dispatcher: Any, tokenizer: Any
) -> None:
    answer = await complete(client, "fox", ignore_eos=True)
    assert dispatcher.requests[0].token_ids == tuple(tokenizer.encode("fox"))
    assert dispatcher.requests[0].token_ids[0] == 0
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] == 16
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    expected, _ = dispatcher.plan(dispatcher.requests[0])
    assert choice["text"] == tokenizer.decode(expected, continuation=True)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("fox", 1), (["fox", "dog", "the"], 3), ([5, 6, 7], 1), ([[5, 6], [7]], 2)],
)
async def test_every_form_of_prompt(
    client: httpx.AsyncClient, dispatcher: Any, prompt: Any, count: int
) -> None:
    answer = await complete(client, prompt, max_tokens=2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(count))
    assert len(dispatcher.requests) == count
    prompt_tokens = sum(request.prompt_len for request in dispatcher.requests)
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["usage"]["completion_tokens"] == 2 * count


async def test_token_ids_go_through_unchanged(client: httpx.AsyncClient, dispatcher: Any) -> None:
    await complete(client, [[5, 6], [7]], max_tokens=1)
    assert {request.token_ids for request in dispatcher.requests} == {(5, 6), (7,)}


async def test_choices_are_numbered_prompt_by_prompt(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    answer = await complete(client, [[5], [6]], n=2, best_of=2, max_tokens=1, return_token_ids=True)
    prompts = [choice["prompt_token_ids"] for choice in answer["choices"]]
    assert prompts == [[5], [5], [6], [6]]
    assert answer["usage"]["prompt_tokens"] == 2


async def test_echo_repeats_the_prompt(client: httpx.AsyncClient) -> None:
    plain = await complete(client, ["fox", "dog"], max_tokens=3)
    echoed = await complete(client, ["fox", "dog"], max_tokens=3, echo=True)
    texts = [choice["text"] for choice in plain["choices"]]
    assert [choice["text"] for choice in echoed["choices"]] == ["fox" + texts[0], "dog" + texts[1]]
    chunks = await stream(client, "fox", max_tokens=3, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "fox" + texts[0]
    assert chunks[0]["choices"][0]["text"].startswith("fox")


def check_logprobs(logprobs: dict[str, Any], text: str, count: int) -> None:
    """Lengths agree, and every offset is where its token begins in the text."""
    assert {len(column) for column in logprobs.values()} == {count}
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token != "<|bos|>":
            assert text[offset:].startswith(token)


async def test_logprobs(client: httpx.AsyncClient, tokenizer: Any, dispatcher: Any) -> None:
    answer = await complete(client, "fox", max_tokens=4, logprobs=2)
    choice = answer["choices"][0]
    check_logprobs(choice["logprobs"], choice["text"], 4)
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 4
    top = choice["logprobs"]["top_logprobs"][0]
    token = dispatcher.reply[0]
    assert top == {tokenizer.token_text(token): -0.5, tokenizer.token_text(token + 1): -1.5}


@pytest.mark.parametrize("streamed", [False, True])
async def test_echoed_logprobs_begin_with_nothing(
    client: httpx.AsyncClient, dispatcher: Any, streamed: bool
) -> None:
    fields = {"max_tokens": 3, "logprobs": 0, "echo": True, "n": 2}
    parts: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    if streamed:
        for chunk in await stream(client, "the fox", **fields):
            parts[chunk["choices"][0]["index"]].append(chunk["choices"][0])
    else:
        for choice in (await complete(client, "the fox", **fields))["choices"]:
            parts[choice["index"]].append(choice)
    prompt_len = dispatcher.requests[0].prompt_len
    for choices in parts.values():
        joined = {
            key: [item for choice in choices for item in choice["logprobs"][key]]
            for key in choices[0]["logprobs"]
        }
        text = "".join(choice["text"] for choice in choices)
        check_logprobs(joined, text, prompt_len + 3)
        assert joined["token_logprobs"][0] is None
        assert joined["top_logprobs"][0] is None
        assert joined["token_logprobs"][1] == -0.5
    assert dispatcher.requests[0].sampling.prompt_logprobs == 0


async def test_prompt_logprobs_per_choice(client: httpx.AsyncClient) -> None:
    answer = await complete(client, [5, 6, 7], n=2, max_tokens=1, prompt_logprobs=0)
    for choice in answer["choices"]:
        assert choice["prompt_logprobs"][0] is None
        assert set(choice["prompt_logprobs"][1]) == {"6"}
        assert choice["prompt_logprobs"][1]["6"]["rank"] == 1


async def test_stream_ends_with_usage_on_request(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True}
    *chunks, last = await stream(client, [5, 6], max_tokens=3, stream_options=options)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 5
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_text_is_held_back_while_it_may_be_a_stop_string(
    client: httpx.AsyncClient, dispatcher: Any
) -> None:
    chunks = await stream(client, "fox", stop="brown cat", max_tokens=30)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == " the quick brown fox jumps over the lazy dog"
    assert not any(chunk["choices"][0]["text"].endswith("bro") for chunk in chunks)


async def test_min_tokens_come_before_any_stop(client: httpx.AsyncClient) -> None:
    early = await complete(client, "a", stop="the", max_tokens=30)
    assert early["choices"][0]["text"] == " "
    late = await complete(client, "a", stop="the", max_tokens=30, min_tokens=10)
    assert late["usage"]["completion_tokens"] >= 10
    assert late["choices"][0]["text"].startswith(" the quick")
