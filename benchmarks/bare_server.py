"""The bound: a server that does nothing but write a ready-made event to every open stream.

`python -m benchmarks.bare_server JOB` takes the same requests as the gateway, reads nothing of
them, and writes the same number of bytes per token from one event loop, one `write` per stream and
iteration, with no worker behind it and no HTTP library. Nothing that sends each stream its token
can be cheaper in this language. Says the same on standard output as `benchmarks.replay`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import asdict
from typing import cast

import uvloop

from benchmarks.replay import SETTLE_SECONDS, ReplayJob, say

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
)
_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef01234567","object":"text_completion",'
    b'"created":1700000000,"model":"bench","choices":[{"index":0,"text":" wabc",'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class _Stream(asyncio.Protocol):
    def __init__(self, server: BareServer) -> None:
        self._server = server
        self._received = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(b"}"):
            self.transport.write(_HEAD)
            self._server.opened(self)


class BareServer:
    """All streams and the loop that feeds them."""

    def __init__(self, job: ReplayJob) -> None:
        self._job = job
        self._streams: list[_Stream] = []
        self._replay: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Serve until killed."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Stream(self), "127.0.0.1", 0, backlog=2048)
        host, port = server.sockets[0].getsockname()
        gc.freeze()
        say(address=f"{host}:{port}")
        await server.serve_forever()

    def opened(self, stream: _Stream) -> None:
        """A request is there."""
        if not self._job.streams:
            stream.transport.write(_CHUNK + _END)
            stream.transport.close()
            return
        self._streams.append(stream)
        if len(self._streams) == self._job.streams:
            self._replay = asyncio.create_task(self._replay_all())

    async def _replay_all(self) -> None:
        await asyncio.sleep(SETTLE_SECONDS)
        say(started=True)
        loop = asyncio.get_running_loop()
        start, sent = loop.time(), []
        for index in range(self._job.tokens):
            await asyncio.sleep(max(0.0, start + index / self._job.rate - loop.time()))
            sent.append(time.monotonic())
            for stream in self._streams:
                stream.transport.write(_CHUNK)
        for stream in self._streams:
            stream.transport.write(_END)
            stream.transport.close()
        say(sent=sent)


def command(job: ReplayJob) -> list[str]:
    """Return the command line that starts the process."""
    return [sys.executable, "-m", "benchmarks.bare_server", json.dumps(asdict(job))]


if __name__ == "__main__":
    uvloop.run(BareServer(ReplayJob(**json.loads(sys.argv[1]))).serve())
