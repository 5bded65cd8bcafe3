"""Around every request: its id, the in-flight gauge, its outcome, and the last net for bugs.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem.gateway.http.context import RequestInfo
from tandem.gateway.http.errors import internal_error_response
from tandem.gateway.metrics import GatewayMetrics, outcome_of_status

_HEADER = b"x-request-id"
_ACCEPTED_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_log = structlog.get_logger(__name__)


class RequestMiddleware:
    """Answers carry `X-Request-Id`: the client's own if it is printable ASCII, else a new one."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        info = RequestInfo(
            _request_id(scope), send, _header(scope, b"authorization"), _header(scope, b"x-tenant")
        )
        scope.setdefault("state", {})["info"] = info
        gauge = self._metrics.in_flight("http")
        with gauge if scope["method"] == "POST" else contextlib.nullcontext():
            await self._run(scope, receive, send, info)

    async def _run(self, scope: Scope, receive: Receive, send: Send, info: RequestInfo) -> None:
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_own_headers(info)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            info.outcome = "cancelled"
            raise
        except Exception:
            _log.exception("request failed", request_id=info.request_id, path=scope["path"])
            info.outcome = "error"
            if status:
                raise  # the answer has begun: the server closes the connection
            await internal_error_response()(scope, receive, send_with_id)
        finally:
            outcome = info.outcome or outcome_of_status(status)
            self._metrics.request_done(_endpoint(scope), outcome)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == _HEADER and _ACCEPTED_ID.fullmatch(value):
            return bytes(value).decode()
    return secrets.token_hex(16)


def _own_headers(info: RequestInfo) -> list[tuple[bytes, bytes]]:
    headers = [(_HEADER, info.request_id.encode())]
    if info.cache is not None:
        headers.append((b"x-tandem-cache", info.cache.encode()))
    return headers


def _header(scope: Scope, wanted: bytes) -> str:
    values = (value for name, value in scope["headers"] if name == wanted)
    return bytes(next(values, b"")).decode("latin-1")


def _endpoint(scope: Scope) -> str:
    """The route's pattern: a bounded set, unlike paths."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) and path else "unmatched"
