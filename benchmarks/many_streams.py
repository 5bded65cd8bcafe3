"""The client of the path benchmark: many open streams, next to no work per token.

`python -m benchmarks.many_streams JOB` counts tokens by the mark that each token's text holds
(`benchmarks.replay.MARK`) and parses nothing. With `one_by_one` it opens the streams one after
another and times each from connecting to its last byte. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import uvloop

from benchmarks.replay import FIRST_WORD, MARK, MODEL

PROMPT_TOKENS = 32
CONNECTING_AT_ONCE = 50


@dataclass(frozen=True)
class ClientJob:
    """What the client is told."""

    host: str
    port: int
    streams: int
    tokens: int
    endpoint: str
    """`completions` or `chat`."""
    one_by_one: bool = False


class _Stream(asyncio.Protocol):
    """Notes when how many tokens came."""

    def __init__(self, request: bytes) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.head = b""
        self._in_body = False
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self.head, end, data = (self.head + data).partition(b"\r\n\r\n")
            self._in_body = bool(end)
        if count := data.count(MARK):
            self.arrivals.append((time.monotonic(), count))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    def check(self, tokens: int) -> None:
        """Raise `RuntimeError` unless the whole answer came."""
        came = sum(count for _, count in self.arrivals)
        if came != tokens:
            raise RuntimeError(f"{came} of {tokens} tokens came; the answer began {self.head!r}")


def request_bytes(job: ClientJob) -> bytes:
    """Return a streaming request for exactly `job.tokens` tokens."""
    content: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": job.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    if job.endpoint == "chat":
        path = "/v1/chat/completions"
        content["messages"] = [{"role": "user", "content": "a" * PROMPT_TOKENS}]
    else:
        path = "/v1/completions"
        content["prompt"] = [FIRST_WORD + number for number in range(PROMPT_TOKENS)]
    body = json.dumps(content).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _run(job: ClientJob) -> dict[str, Any]:
    request = request_bytes(job)
    connecting = asyncio.Semaphore(1 if job.one_by_one else CONNECTING_AT_ONCE)
    loop = asyncio.get_running_loop()
    seconds: list[float] = []

    async def stream() -> list[tuple[float, int]]:
        async with connecting:
            start = time.monotonic()
            _, protocol = await loop.create_connection(lambda: _Stream(request), job.host, job.port)
            if job.one_by_one:
                await protocol.finished
                seconds.append(time.monotonic() - start)
        await protocol.finished
        protocol.check(job.tokens)
        return protocol.arrivals

    gc.freeze()
    arrivals = await asyncio.gather(*(stream() for _ in range(job.streams)))
    return {"seconds": seconds} if job.one_by_one else {"arrivals": arrivals}


def command(job: ClientJob) -> list[str]:
    """Return the command line that starts the process."""
    return [sys.executable, "-m", "benchmarks.many_streams", json.dumps(asdict(job))]


if __name__ == "__main__":
    json.dump(uvloop.run(_run(ClientJob(**json.loads(sys.argv[1])))), sys.stdout)
