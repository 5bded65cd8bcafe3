"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tandem.gateway.choices import Choice, run_choices
from tandem.gateway.http.body import json_body
from tandem.gateway.http.chat_format import ChatWriter
from tandem.gateway.http.chat_schema import ChatRequest
from tandem.gateway.http.context import CurrentEdge, noting_cache, request_info
from tandem.gateway.http.errors import json_response
from tandem.gateway.http.sse import DONE, event_stream, sse_event, until_disconnect
from tandem.gateway.http.unsupported import CHAT

router = APIRouter()
ChatBody = Annotated[ChatRequest, Depends(json_body(ChatRequest, CHAT))]


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatBody, edge: CurrentEdge) -> Response:
    """Answer a chat, whole or as a stream of chunks."""
    info = request_info(request)
    service = edge.service
    model = await service.model(body.model)
    n = body.num_choices(edge.config.max_n)
    body.check_stream_options()
    text = model.render_chat(
        body.messages_for_template(),
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs or {},
    )
    prompt = service.prepare(
        model,
        await service.encode(model, text, add_special_tokens=False),
        body.sampling(),
        prompt_field="messages",
        client_id=info.request_id,
        priority=0 if body.priority is None else body.priority,
        cache_salt=body.cache_salt or "",
        tenant=service.tenants.of(info.authorization, info.claimed_tenant),
        ttft_objective=body.ttft_objective or 0.0,
        itl_objective=body.itl_objective or 0.0,
    )
    writer = ChatWriter(model, prompt, body, n)
    choices = noting_cache(service, run_choices(service, model, [prompt], n, info.arrival), info)
    if body.stream:
        return await event_stream(request, _events(writer, choices))
    return json_response(await until_disconnect(request, writer.whole(choices)))


async def _events(
    writer: ChatWriter, choices: AsyncGenerator[Choice, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(choices):
        async for choice in choices:
            for event in writer.events(choice):
                yield event
    if (last := writer.usage_chunk()) is not None:
        yield sse_event(last)
    yield DONE
