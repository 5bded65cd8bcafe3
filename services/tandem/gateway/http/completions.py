"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tandem.core import request as core
from tandem.core.errors import InvalidRequestError
from tandem.gateway.choices import Choice, run_choices
from tandem.gateway.http.body import json_body
from tandem.gateway.http.completions_format import CompletionWriter, EchoedPrompt
from tandem.gateway.http.completions_schema import CompletionRequest, Prompt
from tandem.gateway.http.context import CurrentEdge, RequestInfo, noting_cache, request_info
from tandem.gateway.http.errors import json_response
from tandem.gateway.http.sse import DONE, event_stream, sse_event, until_disconnect
from tandem.gateway.http.unsupported import COMPLETIONS
from tandem.gateway.model import ServedModel
from tandem.gateway.service import InferenceService

MAX_CHOICES = 1024
"""Prompts times `n` of one call."""
router = APIRouter()
CompletionBody = Annotated[CompletionRequest, Depends(json_body(CompletionRequest, COMPLETIONS))]


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionBody, edge: CurrentEdge) -> Response:
    """Continue one or more prompts, whole or as a stream of chunks."""
    info = request_info(request)
    service = edge.service
    model = await service.model(body.model)
    n = body.num_choices(edge.config.max_n)
    body.check_best_of(n)
    body.check_stream_options()
    if len(body.prompts()) * n > MAX_CHOICES:
        raise InvalidRequestError(
            f"prompt must have at most {MAX_CHOICES // n} entries with n = {n}, "
            f"got {len(body.prompts())}",
            param="prompt",
        )
    prompts = [await _prepare(service, model, body, prompt, info) for prompt in body.prompts()]
    echoes = [
        _echo(model, prompt, text) for prompt, text in zip(prompts, body.prompts(), strict=True)
    ]
    writer = CompletionWriter(model, echoes, body, n)
    choices = noting_cache(service, run_choices(service, model, prompts, n, info.arrival), info)
    if body.stream:
        return await event_stream(request, _events(writer, choices))
    return json_response(await until_disconnect(request, writer.whole(choices)))


async def _prepare(
    service: InferenceService,
    model: ServedModel,
    body: CompletionRequest,
    prompt: Prompt,
    info: RequestInfo,
) -> core.Request:
    return service.prepare(
        model,
        await service.encode(model, prompt) if isinstance(prompt, str) else prompt,
        body.sampling(),
        client_id=info.request_id,
        priority=0 if body.priority is None else body.priority,
        cache_salt=body.cache_salt or "",
        tenant=service.tenants.of(info.authorization, info.claimed_tenant),
        ttft_objective=body.ttft_objective or 0.0,
        itl_objective=body.itl_objective or 0.0,
    )


def _echo(model: ServedModel, request: core.Request, prompt: Prompt) -> EchoedPrompt:
    text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
    return EchoedPrompt(text, request.token_ids)


async def _events(
    writer: CompletionWriter, choices: AsyncGenerator[Choice, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(choices):
        async for choice in choices:
            for event in writer.events(choice):
                yield event
    if (last := writer.usage_chunk()) is not None:
        yield sse_event(last)
    yield DONE
