"""Every error as OpenAI shapes it: `{"error": {"message", "type", "param", "code"}}`.

Invariant: nothing leaves the HTTP edge with a status of 400 or more in any other shape.
"""

from __future__ import annotations

import math
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tandem.core.errors import InvalidRequestError, OverloadedError, TandemError, UnavailableError
from tandem.gateway.http.context import request_info

CLIENT_CLOSED_REQUEST = 499
_UNAVAILABLE_RETRY_SECONDS = 1.0


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a JSON response."""
    return Response(orjson.dumps(content), status, headers, "application/json")


def error_object(error: TandemError) -> dict[str, Any]:
    """Return the body for an error."""
    return _shape(error.message, error.openai_type, error.param, error.code)


def internal_error_object() -> dict[str, Any]:
    """Return the body for a bug. What went wrong is in the log, under the request's id."""
    return _shape("internal error", TandemError.openai_type, None, "internal_error")


def error_response(error: TandemError) -> Response:
    """Return the response for an error."""
    return json_response(error_object(error), error.http_status, _retry_headers(error))


def internal_error_response() -> Response:
    """Return the response for a bug."""
    return json_response(internal_error_object(), 500)


def install_error_handlers(app: FastAPI) -> None:
    """Make an app answer every error in OpenAI's shape."""
    app.add_exception_handler(TandemError, _on_tandem_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)


def _shape(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _retry_headers(error: TandemError) -> dict[str, str] | None:
    if isinstance(error, OverloadedError):
        return {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, UnavailableError):
        return {"retry-after": str(math.ceil(_UNAVAILABLE_RETRY_SECONDS))}
    return None


async def _on_tandem_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Routing errors: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    message, code = {
        404: (f"unknown URL: {where}", "unknown_url"),
        405: (f"method not allowed: {where}", "method_not_allowed"),
    }.get(error.status_code, (str(error.detail), None))
    kind = InvalidRequestError.openai_type if error.status_code < 500 else TandemError.openai_type
    body = _shape(message, kind, None, code)
    return json_response(body, error.status_code, dict(error.headers or {}))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    return error_response(InvalidRequestError(str(error)))


async def _on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this answer; the status is for the log of a proxy, if there is one."""
    request_info(request).outcome = "cancelled"
    return Response(status_code=CLIENT_CLOSED_REQUEST)
