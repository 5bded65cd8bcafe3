"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BeforeValidator
from starlette.responses import Response

from tandem.core.errors import InvalidRequestError
from tandem.core.sampling import validate_token_ids
from tandem.gateway.http.body import json_body
from tandem.gateway.http.chat_schema import Message
from tandem.gateway.http.context import CurrentEdge
from tandem.gateway.http.errors import json_response
from tandem.gateway.http.fields import StrictModel

router = APIRouter()


class TokenizeRequest(StrictModel):
    """A text or a chat. Special tokens are added to a text unless it says otherwise."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


def _ids(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class DetokenizeRequest(StrictModel):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[tuple[int, ...], BeforeValidator(_ids)]


TokenizeBody = Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]
DetokenizeBody = Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))]


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeBody, edge: CurrentEdge) -> Response:
    """Return the token ids of a text, or of a chat as the model would see it."""
    model = await edge.service.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("exactly one of prompt and messages is required", param="prompt")
    special = body.add_special_tokens
    if body.prompt is not None:
        text, special = body.prompt, special is not False
    else:
        messages = [message.for_template() for message in body.messages or []]
        if not messages:
            raise InvalidRequestError("messages must not be empty", param="messages")
        text, special = (
            model.render_chat(
                messages,
                add_generation_prompt=body.add_generation_prompt,
                variables=body.chat_template_kwargs or {},
            ),
            special is True,
        )
    ids = await edge.service.encode(model, text, add_special_tokens=special)
    answer = {"count": len(ids), "max_model_len": model.info.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [model.tokenizer.token_text(token_id) for token_id in ids]
    return json_response(answer)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeBody, edge: CurrentEdge) -> Response:
    """Return the text of token ids, special tokens written out."""
    model = await edge.service.model(body.model)
    validate_token_ids(body.tokens, "tokens", model.info.vocab_size)
    return json_response({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)})
