"""Ready-made events are those that would have been written from scratch."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.http.sse import EventTemplate, sse_event


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_reads_the_same(text: str) -> None:
    def content(delta: str) -> dict[str, Any]:
        return {"id": "cmpl-1", "model": 'a "b"', "choices": [{"text": delta, "index": 0}]}

    template = EventTemplate(content(EventTemplate.HOLE))
    assert template.event(text) == sse_event(content(text))


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
async def test_later_chunks_have_the_fields_of_the_first(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], usage: bool
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": usage}}
    answer = await client.post(path, json={**body, **options, "model": "tiny"})
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    chunks = [orjson.loads(event) for event in events]
    texts = [chunk for chunk in chunks if chunk["choices"]]
    assert len(texts) > 4
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {tuple(chunk) for chunk in texts} == {tuple(texts[0])}
    plain = [chunk["choices"][0] for chunk in texts[:-1]]
    assert {tuple(choice) for choice in plain} == {tuple(plain[0])}
    assert {choice["finish_reason"] for choice in plain} == {None}
    assert ("usage" in texts[1]) is usage
