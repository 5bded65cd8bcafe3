"""One streaming completion over HTTP: when was it sent, when did each token come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.core.errors import UnavailableError

_TIMEOUT = 300.0
_DATA = b"data: "


@dataclass(frozen=True)
class Endpoint:
    """A gateway and the model that it serves."""

    host: str
    port: int
    model: str


@dataclass
class Stream:
    """Times on one monotonic clock, in seconds."""

    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Send to first token."""
        return self.tokens[0] - self.sent


def _nothing() -> None:
    return


async def complete(
    endpoint: Endpoint,
    prompt: list[int],
    max_tokens: int,
    stream: Stream | None = None,
    heard: Callable[[], None] = _nothing,
) -> Stream:
    """Send one greedy completion of exactly `max_tokens`, note its tokens in `stream` as they come
    and call `heard` after each; return when all are there.

    Raises `UnavailableError` when the gateway cannot be reached or answers with an error.
    """
    stream = stream or Stream()
    try:
        async with asyncio.timeout(_TIMEOUT):
            said = await _exchange(endpoint, prompt, max_tokens, stream, heard)
    except (OSError, TimeoutError) as error:
        where = f"{endpoint.host}:{endpoint.port}"
        raise UnavailableError(f"the gateway at {where} does not answer: {error!r}") from error
    if len(stream.tokens) != max_tokens:
        why = said.decode(errors="replace")[:300]
        raise UnavailableError(f"{len(stream.tokens)} of {max_tokens} tokens came: {why}")
    return stream


async def _exchange(
    endpoint: Endpoint,
    prompt: list[int],
    max_tokens: int,
    stream: Stream,
    heard: Callable[[], None],
) -> bytes:
    """Send and read; return the last line, which says what was wrong if something was."""
    request = _request(endpoint, prompt, max_tokens)
    stream.sent, last = time.perf_counter(), b""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        writer.write(request)
        while line := await reader.readline():  # headers and the sizes of chunks are passed over
            now = time.perf_counter()
            tokens = _count(line)
            if tokens:
                stream.tokens.extend([now] * tokens)
                heard()
            last = line if line.strip() else last
        return last
    finally:
        writer.close()


def _request(endpoint: Endpoint, prompt: list[int], max_tokens: int) -> bytes:
    body = json.dumps(
        {
            "model": endpoint.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {endpoint.host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _count(line: bytes) -> int:
    """Tokens in one event."""
    if not line.startswith(_DATA) or line.startswith(b"data: [DONE]"):
        return 0
    choices = json.loads(line.removeprefix(_DATA)).get("choices") or ()
    return sum(len(choice.get("token_ids") or ()) for choice in choices)
