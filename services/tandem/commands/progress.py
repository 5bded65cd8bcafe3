"""What a starting cluster shows: one line per worker, live on a terminal, on change elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from tandem.v1 import cluster_pb2, cluster_pb2_grpc

READY = cluster_pb2.WORKER_STATE_READY
DEAD = cluster_pb2.WORKER_STATE_DEAD
STATE_STYLES = {"starting": "cyan", "ready": "green", "unresponsive": "yellow", "dead": "red"}


class ClusterView:
    """The controller's status, over gRPC."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = cluster_pb2_grpc.ClusterStub(self._channel)

    def status(self, timeout: float = 2.0) -> cluster_pb2.ClusterStatus | None:
        """None while the controller does not answer: it may be restarting."""
        try:
            return self._stub.Status(cluster_pb2.StatusRequest(), timeout=timeout)
        except grpc.RpcError:
            return None

    def close(self) -> None:
        self._channel.close()


def state_name(worker: cluster_pb2.WorkerStatus) -> str:
    """`ready`, `dead`, ... as people and `--json` see it."""
    name = cluster_pb2.WorkerState.Name(worker.state)
    return name.removeprefix("WORKER_STATE_").lower()


def role_name(worker: cluster_pb2.WorkerStatus) -> str:
    """`prefill` or `decode`."""
    return cluster_pb2.Role.Name(worker.role).removeprefix("ROLE_").lower()


def describe(worker: cluster_pb2.WorkerStatus) -> str:
    """State and detail of one worker in a few words."""
    state = state_name(worker)
    return f"{state}: {worker.detail}" if worker.detail else state


class StartProgress:
    """Lines about stages and workers while a cluster starts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, str] = {}
        self._live: Live | None = None
        self._stage = ""

    @contextmanager
    def shown(self) -> Iterator[StartProgress]:
        """Show lines until the block ends."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(console=self._console, transient=True, refresh_per_second=8) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def stage(self, text: str) -> None:
        """What is being started now."""
        if text == self._stage:
            return
        self._stage = text
        if self._live is None:
            self._console.print(text, markup=False)
        else:
            self._render()

    def workers(self, status: cluster_pb2.ClusterStatus | None) -> None:
        """How far each worker is."""
        for worker in status.workers if status is not None else ():
            line = describe(worker)
            if self._shown.get(worker.name) == line:
                continue
            self._shown[worker.name] = line
            if self._live is None:
                self._console.print(f"  {worker.name:<12} {line}", markup=False)
        if self._live is not None:
            self._render()

    def _render(self) -> None:
        if self._live is None:
            return
        lines = [
            Text(f"  {name:<12} ").append(line, style=STATE_STYLES.get(line.split(":")[0], ""))
            for name, line in self._shown.items()
        ]
        self._live.update(Group(Spinner("dots", text=self._stage), *lines))
