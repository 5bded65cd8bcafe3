"""Request bodies: bytes in, a checked pydantic model out. Every fault is a 4xx that names it.

Invariant: never more than the configured number of bytes of a body is held, however it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from tandem.core.errors import InvalidRequestError, PayloadTooLargeError
from tandem.gateway.http.context import CurrentEdge
from tandem.gateway.http.unsupported import refuse_unsupported

Model = TypeVar("Model", bound=BaseModel)
_SHOWN_CHARACTERS = 80


def json_body(
    model: type[Model], unsupported: Mapping[str, tuple[object, ...]] | None = None
) -> Callable[[Request, CurrentEdge], Coroutine[Any, Any, Model]]:
    """Return a dependency that reads, parses and checks a JSON body.

    `unsupported` are fields that the API knows and that this server does not do, each with the
    values that ask for nothing.
    """

    async def read(request: Request, edge: CurrentEdge) -> Model:
        content = parse_object(await read_body(request, edge.config.max_body_bytes))
        refuse_unsupported(content, unsupported or {})
        try:
            return model.model_validate(content)
        except ValidationError as error:
            raise invalid_field(error) from error

    return read


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body. Raises `PayloadTooLargeError` as soon as more than `limit` is certain."""
    too_large = PayloadTooLargeError(
        f"the request body is larger than the {limit} bytes allowed", code="request_too_large"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises `InvalidRequestError` saying what is wrong."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(_what_is_wrong(body, error), code="invalid_json") from error
    if not isinstance(content, dict):
        raise InvalidRequestError("the request body must be a JSON object", code="invalid_json")
    return content


def invalid_field(error: ValidationError) -> InvalidRequestError:
    """Return the error for the first field that is not as it must be."""
    first = error.errors(include_url=False)[0]
    field = _path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return InvalidRequestError(f"{field} is required", param=field, code="missing_field")
    shown = repr(first["input"])
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    return InvalidRequestError(f"{field}: {message}, got {shown}", param=field, code="invalid_type")


def _what_is_wrong(body: bytes, error: orjson.JSONDecodeError) -> str:
    if not body.strip():
        return "the request body is empty; a JSON object is expected"
    try:
        body.decode()
    except UnicodeDecodeError as invalid:
        return f"the request body is not valid UTF-8: {invalid.reason} at byte {invalid.start}"
    return f"the request body is not valid JSON: {error}"


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` for ("messages", 0, "content")."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".") or "body"
