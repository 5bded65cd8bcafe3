"""A server that streams like the gateway, so that the load client can be tested alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest


@dataclass
class FakeGateway:
    """Answers completions with as many tokens as asked for, in pieces as it is told."""

    port: int = 0
    status: bytes = b"200 OK"
    piece_bytes: int = 1 << 20
    """Answers are written this many bytes at a time."""
    tokens_per_event: int = 1
    truncate: bool = False
    """End the connection without the last event."""
    hang: bool = False
    """Send one token and then nothing."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        body = orjson.loads(await reader.readexactly(length))
        self.bodies.append(body)
        answer = self._answer(body)
        for start in range(0, len(answer), self.piece_bytes):
            writer.write(answer[start : start + self.piece_bytes])
            await writer.drain()
        if self.hang:
            await self.release.wait()
        writer.close()

    def _answer(self, body: dict[str, Any]) -> bytes:
        head = b"HTTP/1.1 " + self.status + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        if not self.status.startswith(b"200"):
            return head + _chunk(b'{"error": {"message": "no such model"}}') + _chunk(b"")
        events = self._events(body)
        if self.hang:
            return head + events[0]
        return head + b"".join(events[:-1] if self.truncate else [*events, _chunk(b"")])

    def _events(self, body: dict[str, Any]) -> list[bytes]:
        tokens = list(range(body["max_tokens"]))
        step = self.tokens_per_event
        groups = [tokens[start : start + step] for start in range(0, len(tokens), step)]
        contents: list[dict[str, Any]] = [
            {"choices": [{"text": "a\\n\\nb", "token_ids": group}]} for group in groups
        ]
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "prompt_tokens_details": {"cached_tokens": 16},
        }
        contents.append({"choices": [], "usage": usage})
        datas = [*(orjson.dumps(content) for content in contents), b"[DONE]"]
        return [_chunk(b"data: " + data + b"\n\n") for data in datas]


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


Serve = Callable[..., AbstractAsyncContextManager[FakeGateway]]


@pytest.fixture
def serve() -> Serve:
    @asynccontextmanager
    async def serving(**settings: Any) -> AsyncIterator[FakeGateway]:
        gateway = FakeGateway(**settings)
        server = await asyncio.start_server(gateway.serve, "127.0.0.1", 0)
        gateway.port = server.sockets[0].getsockname()[1]
        try:
            yield gateway
        finally:
            gateway.release.set()
            server.close()
            await server.wait_closed()

    return serving
