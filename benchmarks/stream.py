"""One streaming completion over a raw connection: as little work per token as Python allows.

Speaks what it needs of HTTP/1.1 (one request per connection, chunked answers) and of server-sent
events. Stamps a token with the time at which its bytes were read, before anything is parsed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

_END_OF_HEADERS = b"\r\n\r\n"


@dataclass
class StreamedAnswer:
    """What came back. Times are of `time.perf_counter`."""

    token_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    done: bool = False
    error: str = ""


class CompletionStream(asyncio.Protocol):
    """Sends one request and reads its answer; `finished` is set when the connection ends.

    Parsing is a pipe of three stages: headers, transfer chunks, events. Each keeps what it cannot
    use yet and takes it up when more bytes come.
    """

    def __init__(self, request: bytes) -> None:
        self.answer = StreamedAnswer()
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._raw = bytearray()
        self._events = bytearray()
        self._headers_read = False
        self._chunked = False
        self._status = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._raw += data
        if not self._headers_read and not self._read_headers():
            return
        if self._chunked:
            self._unwrap_chunks()
        else:
            self._events += self._raw
            self._raw.clear()
        if self._status == 200:
            self._read_events(now)

    def connection_lost(self, error: Exception | None) -> None:
        answer = self.answer
        if self._status not in (0, 200):
            answer.error = f"HTTP {self._status}: {self._events[:300].decode(errors='replace')}"
        elif not answer.done and not answer.error:
            answer.error = f"connection ended before the answer did: {error or 'closed'}"
        if not self.finished.done():
            self.finished.set_result(None)

    def abort(self, reason: str) -> None:
        """Give up: what has come so far stays, with `reason` as the error."""
        self.answer.error = self.answer.error or reason
        if self._transport is not None:
            self._transport.abort()

    def _read_headers(self) -> bool:
        end = self._raw.find(_END_OF_HEADERS)
        if end < 0:
            return False
        lines = bytes(self._raw[:end]).lower().split(b"\r\n")
        del self._raw[: end + len(_END_OF_HEADERS)]
        self._status = int(lines[0].split()[1])
        self._chunked = any(line == b"transfer-encoding: chunked" for line in lines)
        self._headers_read = True
        return True

    def _unwrap_chunks(self) -> None:
        """Move whole transfer chunks from `_raw` to `_events`."""
        start = 0
        while (line_end := self._raw.find(b"\r\n", start)) >= 0:
            size = int(self._raw[start:line_end], 16)
            chunk_end = line_end + 2 + size
            if len(self._raw) < chunk_end + 2:
                break
            self._events += self._raw[line_end + 2 : chunk_end]
            start = chunk_end + 2
        del self._raw[:start]

    def _read_events(self, now: float) -> None:
        *events, rest = bytes(self._events).split(b"\n\n")
        self._events = bytearray(rest)
        for event in events:
            if event.startswith(b"data: "):
                self._read_event(event[6:], now)

    def _read_event(self, data: bytes, now: float) -> None:
        answer = self.answer
        if data == b"[DONE]":
            answer.done = True
            if self._transport is not None:
                self._transport.close()
            return
        content: dict[str, Any] = orjson.loads(data)
        if "error" in content:
            answer.error = str(content["error"])
        for choice in content.get("choices") or ():
            answer.token_times.extend([now] * _tokens(choice))
        if usage := content.get("usage"):
            answer.prompt_tokens = usage["prompt_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            answer.cached_tokens = details.get("cached_tokens") or 0


def _tokens(choice: Mapping[str, Any]) -> int:
    """Tokens of an event; of a server that does not give their ids, one for an event with text."""
    if "token_ids" in choice:
        return len(choice["token_ids"] or ())
    return 1 if choice.get("text") else 0


def completion_request(
    host: str,
    model: str,
    prompt: tuple[int, ...],
    max_tokens: int,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the bytes of a greedy streaming completion that ends at `max_tokens` exactly.

    `extra` are fields that only some servers know.
    """
    return post_request(
        host,
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            **(extra or {}),
        },
    )


def post_request(host: str, content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a request to the completions endpoint, one per connection."""
    body = orjson.dumps(content)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
