"""Answers that take a while: server-sent events, and cancelling when the client leaves.

Invariant: the status of a stream is sent with its first event, so that a request that fails before
has its proper status; one that fails later ends with an `error` event and no `[DONE]`. When the
client leaves, the work is cancelled and its generators are closed before the handler returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
import structlog
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tandem.core.errors import TandemError
from tandem.gateway.http.context import RequestInfo, request_info
from tandem.gateway.http.errors import error_object, internal_error_object
from tandem.gateway.metrics import outcome_of_status

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_log = structlog.get_logger(__name__)


def sse_event(content: Any) -> bytes:
    """Return one event: JSON never holds a bare line break, so one `data` line is enough."""
    return b"data: %b\n\n" % orjson.dumps(content)


class EventTemplate:
    """Events that differ in one string only: what stands around it is written once."""

    HOLE = "\0"

    def __init__(self, content: Any) -> None:
        """`content` has `HOLE` where the string goes, once."""
        self._before, self._after = sse_event(content).split(orjson.dumps(self.HOLE))

    def event(self, text: str) -> bytes:
        """Return the event with `text` in the hole."""
        return b"%b%b%b" % (self._before, orjson.dumps(text), self._after)


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancel it and raise `ClientDisconnect` when the client leaves first."""
    task = asyncio.ensure_future(work)
    if not await _first_done(task, request.receive):
        raise ClientDisconnect
    return task.result()


async def event_stream(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """Return a streaming response, once there is a first event.

    Raises what `events` raises before its first event.
    """
    try:
        first = await until_disconnect(request, _next(events))
    except BaseException:
        await events.aclose()
        raise
    return _EventStream(first, events, request_info(request))


class _EventStream(Response):
    """Sends events as they come."""

    def __init__(
        self, first: bytes, events: AsyncGenerator[bytes, None], info: RequestInfo
    ) -> None:
        super().__init__()
        self._first = first
        self._events = events
        self._info = info

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        task = asyncio.ensure_future(self._send_all(self._info.send))
        if not await _first_done(task, receive):
            self._info.outcome = "cancelled"
        else:
            task.result()

    async def _send_all(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                await send(_body(self._first))
                async for event in events:
                    await send(_body(event))
        except TandemError as error:
            self._info.outcome = outcome_of_status(error.http_status)
            await send(_body(sse_event(error_object(error))))
        except Exception:
            _log.exception("stream failed", request_id=self._info.request_id)
            self._info.outcome = "error"
            await send(_body(sse_event(internal_error_object())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(content: bytes) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": True}


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _first_done(task: asyncio.Future[Any], receive: Receive) -> bool:
    """Wait for a task or for the client to leave; return whether the task ended by itself."""
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        watcher.cancel()
        unfinished = [future for future in (task, watcher) if not future.done()]
        task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
