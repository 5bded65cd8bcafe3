"""Servers of other engines as child processes: started, waited for, frozen, always stopped.

A server and everything it starts is one process group in a session of its own, so ctrl-C reaches
the benchmark alone, which then stops the group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import psutil

from benchmarks.launch import HOST
from benchmarks.peers.environments import UnavailableError

READY_TIMEOUT = 600.0
STOP_TIMEOUT = 15.0
POLL_INTERVAL = 0.25
LOG_TAIL_BYTES = 3000


@dataclass(frozen=True)
class Group:
    """A child process with what it started."""

    pid: int

    def freeze(self) -> None:
        """Let it take no CPU until `thaw`."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.killpg(self.pid, signal.SIGCONT)


@contextmanager
def process_group(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the duration of the block; stdin and stdout are pipes, stderr the log."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


@contextmanager
def http_server(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Group]:
    """Run a server that answers 200 at /health once it serves; all it prints goes to the log.

    The block begins at once: `wait_until_healthy` waits, so that several can start together.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["/bin/sh", "-c", 'exec "$@" >&2', "sh", *arguments]
    with process_group(command, log, environment) as process:
        yield Group(process.pid)


def wait_until_healthy(server: Group, port: int, log: Path) -> None:
    """Wait until the server answers. Raises `UnavailableError` when it ends or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT
    while time.monotonic() < deadline:
        if not _alive(server.pid):
            raise UnavailableError(f"the server ended: {last_error(log)}; see {log.name}")
        with contextlib.suppress(OSError), urlopen(f"http://{HOST}:{port}/health", timeout=5) as a:
            if a.status == 200:
                return
        time.sleep(POLL_INTERVAL)
    raise UnavailableError(f"the server was not ready in {READY_TIMEOUT:.0f} s; see {log.name}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, then kill what is left of it, also what left the group."""
    descendants: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    for number in (signal.SIGCONT, signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def last_error(log: Path) -> str:
    """Return the last line of a log that names an error, else its last line."""
    lines = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def raise_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into an exception, so that what was started is stopped."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
