"""Started engines, all alike: a batch of prompts in, the times of all tokens out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.client import LoadError, run_client
from benchmarks.launch import HOST
from benchmarks.load import NICENESS, LoadJob
from benchmarks.peers.environments import PEERS, UnavailableError
from benchmarks.peers.recipes import PROGRAMS
from benchmarks.servers import Group, last_error, process_group
from benchmarks.workload import PlannedRequest

Batch = Sequence[Sequence[int]]
TokenTimes = list[list[float]]
"""Seconds from the moment a batch was sent, per request and token."""
REQUEST_TIMEOUT = 300.0
LEAST_TOKENS_SEEN = 0.9
"""A server that streams text and not tokens may join a few."""


class Session(Protocol):
    """An engine that is ready."""

    description: str

    def generate(self, prompts: Batch, max_tokens: int) -> TokenTimes:
        """Answer a batch greedily, `max_tokens` each. Raises `LoadError`."""
        ...

    def freeze(self) -> None:
        """Take no CPU until `thaw`."""
        ...

    def thaw(self) -> None:
        """Go on."""
        ...


@dataclass
class Server:
    """An engine behind the completions endpoint; the client runs at nice 19."""

    description: str
    port: int
    model: str
    group: Group | None = None
    """None: it is never frozen."""
    extra: dict[str, Any] = field(default_factory=dict)

    def generate(self, prompts: Batch, max_tokens: int) -> TokenTimes:
        planned = tuple(
            PlannedRequest(index, 0.0, tuple(prompt), max_tokens, shared=False)
            for index, prompt in enumerate(prompts)
        )
        job = LoadJob(
            host=HOST,
            port=self.port,
            model=self.model,
            timeout=REQUEST_TIMEOUT,
            niceness=NICENESS,
            requests=planned,
            extra=self.extra,
        )
        records, _ = run_client(job)
        begun = min(record.sent_at for record in records)
        for record in records:
            if record.error or len(record.token_times) < LEAST_TOKENS_SEEN * max_tokens:
                seen = f"{len(record.token_times)} of {max_tokens} tokens"
                raise LoadError(f"{self.description}: {record.error or seen}")
        return [[moment - begun for moment in record.token_times] for record in records]

    def freeze(self) -> None:
        if self.group is not None:
            self.group.freeze()

    def thaw(self) -> None:
        if self.group is not None:
            self.group.thaw()


@dataclass
class Program:
    """An engine in a process of its own that is asked over pipes: see programs/protocol.py."""

    description: str
    process: subprocess.Popen[bytes]
    log: Path

    def generate(self, prompts: Batch, max_tokens: int) -> TokenTimes:
        assert self.process.stdin is not None
        job = {"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens}
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise LoadError(f"{self.description} ended: {last_error(self.log)}") from error
        answer = self._read()
        if answer is None:
            raise LoadError(f"{self.description} ended: {last_error(self.log)}")
        times: TokenTimes = answer["token_times"]
        return times

    def freeze(self) -> None:
        Group(self.process.pid).freeze()

    def thaw(self) -> None:
        Group(self.process.pid).thaw()

    def _read(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None


@contextmanager
def program(
    python: Path | str, name: str, arguments: Sequence[str], environment: dict[str, str]
) -> Iterator[Program]:
    """Run `programs/NAME.py`; the block begins when its engine is loaded.

    Raises `UnavailableError` when it does not load.
    """
    PEERS.mkdir(parents=True, exist_ok=True)
    log = PEERS / f"{name}.log"
    command = [str(python), str(PROGRAMS / f"{name}.py"), *arguments]
    with process_group(command, log, environment) as process:
        session = Program(name, process, log)
        ready = session._read()
        if ready is None:
            raise UnavailableError(f"{name} ended while it loaded: {last_error(log)}")
        session.description = ready["ready"]
        yield session
