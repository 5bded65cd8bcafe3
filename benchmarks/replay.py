"""A cluster that replays tokens: controller and decode worker without an engine, in one process.

`python -m benchmarks.replay JOB MODEL_DIRECTORY` speaks the real protocols (`Cluster.Watch`,
`Decode.Serve`) and holds every sequence until all of a job's streams are there; then each of its
iterations sends one token of every sequence in one message per gateway, at a steady pace. So only
the path from worker to client is measured. Says on standard output, a JSON object per line, where
it listens, that the replay has started, and when each iteration left.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tandem.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

MODEL = "bench"
MARK = b"w"
"""Stands once in the text of each replayed token and nowhere else in an answer."""
WORDS = 100
FIRST_WORD = 257
INCARNATION = 1
HEARTBEAT_SECONDS = 0.5
SETTLE_SECONDS = 0.2
"""From the last submission to the first iteration: what the prompts cost is not measured."""


@dataclass(frozen=True)
class ReplayJob:
    """What is replayed."""

    streams: int
    """Sequences that must be there before the first token; 0: each is answered at once."""
    tokens: int
    rate: float
    """Iterations per second."""


def say(**content: Any) -> None:
    """Tell the benchmark something."""
    print(json.dumps(content), flush=True)


def write_model(directory: Path) -> None:
    """Write what a gateway needs: a byte-level tokenizer with words that hold the mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("Ġw" + "".join(letters) for letters in product("abcde", repeat=3))
    texts = ["<|end|>", *alphabet, *islice(words, WORDS)]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings = {"eos_token": "<|end|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "config.json").write_text("{}", encoding="utf-8")


class Session:
    """One gateway's stream and its sequences."""

    def __init__(self) -> None:
        self.outbox: asyncio.Queue[worker_pb2.DecodeMessage] = asyncio.Queue()
        self.requests: list[tuple[str, int]] = []

    def send(self, **kind: Any) -> None:
        self.outbox.put_nowait(worker_pb2.DecodeMessage(incarnation=INCARNATION, **kind))

    def send_tokens(self, index: int, *, last: bool) -> None:
        """Send token `index` of every sequence in one message."""
        reason = (
            inference_pb2.FINISH_REASON_LENGTH if last else inference_pb2.FINISH_REASON_UNSPECIFIED
        )
        token_ids = (FIRST_WORD + index % WORDS,)
        outputs = [
            worker_pb2.SequenceOutput(
                request_id=request_id,
                attempt=attempt,
                output_index=index,
                token_ids=token_ids,
                finish_reason=reason,
                first=None if index else worker_pb2.FirstTokenInfo(),
            )
            for request_id, attempt in self.requests
        ]
        self.send(outputs=worker_pb2.OutputBatch(iteration=index, outputs=outputs))


class ReplayCluster(worker_pb2_grpc.DecodeServicer, cluster_pb2_grpc.ClusterServicer):
    """Controller and decode worker."""

    def __init__(self, job: ReplayJob, model: Path) -> None:
        self._job = job
        self._model = model
        self._sessions: list[Session] = []
        self._replay: asyncio.Task[None] | None = None
        self.address = ""

    async def Watch(  # noqa: N802 - named by the proto
        self, request: cluster_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[cluster_pb2.Membership]:
        yield cluster_pb2.Membership(
            version=1,
            members=[
                cluster_pb2.Member(
                    name="decode-0",
                    role=cluster_pb2.ROLE_DECODE,
                    address=self.address,
                    incarnation=INCARNATION,
                )
            ],
            model=cluster_pb2.ModelInfo(
                name=MODEL,
                path=str(self._model),
                max_model_len=1 << 20,
                block_size=16,
                vocab_size=FIRST_WORD + WORDS,
            ),
        )
        await asyncio.Event().wait()

    async def Status(  # noqa: N802 - named by the proto
        self, request: cluster_pb2.StatusRequest, context: Any
    ) -> cluster_pb2.ClusterStatus:
        return cluster_pb2.ClusterStatus(model=MODEL)

    async def Serve(  # noqa: N802 - named by the proto
        self, request_iterator: AsyncIterator[worker_pb2.GatewayMessage], context: Any
    ) -> AsyncIterator[worker_pb2.DecodeMessage]:
        session = Session()
        self._sessions.append(session)
        session.send(hello=worker_pb2.DecodeHello(name="decode-0"))
        helpers = [
            asyncio.create_task(self._read(session, request_iterator)),
            asyncio.create_task(self._beat(session)),
        ]
        try:
            while True:
                yield await session.outbox.get()
        finally:
            for task in helpers:
                task.cancel()

    async def _beat(self, session: Session) -> None:
        while True:
            session.send(heartbeat=worker_pb2.Heartbeat(iterations=time.monotonic_ns()))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _read(
        self, session: Session, messages: AsyncIterator[worker_pb2.GatewayMessage]
    ) -> None:
        async for message in messages:
            if message.WhichOneof("kind") != "submit":
                continue
            session.requests.append((message.submit.request_id, message.submit.attempt))
            if not self._job.streams:
                session.send_tokens(0, last=True)
                session.requests.clear()
            elif sum(len(each.requests) for each in self._sessions) == self._job.streams:
                self._replay = asyncio.create_task(self._replay_all())

    async def _replay_all(self) -> None:
        await asyncio.sleep(SETTLE_SECONDS)
        say(started=True)
        loop = asyncio.get_running_loop()
        start, sent = loop.time(), []
        for index in range(self._job.tokens):
            await asyncio.sleep(max(0.0, start + index / self._job.rate - loop.time()))
            sent.append(time.monotonic())
            for session in self._sessions:
                session.send_tokens(index, last=index == self._job.tokens - 1)
        say(sent=sent)


async def _main(job: ReplayJob, model: Path) -> None:
    cluster = ReplayCluster(job, model)
    server = grpc.aio.server()
    worker_pb2_grpc.add_DecodeServicer_to_server(cluster, server)
    cluster_pb2_grpc.add_ClusterServicer_to_server(cluster, server)
    cluster.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    gc.freeze()
    say(address=cluster.address)
    await server.wait_for_termination()


def command(job: ReplayJob, model: Path) -> list[str]:
    """Return the command line that starts the process."""
    return [sys.executable, "-m", "benchmarks.replay", json.dumps(asdict(job)), str(model)]


if __name__ == "__main__":
    uvloop.run(_main(ReplayJob(**json.loads(sys.argv[1])), Path(sys.argv[2])))
