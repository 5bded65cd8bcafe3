"""A peer in a process of its own, driven over a socket pair that also carries link messages.

`PeerProcess` is the parent's side. Run as a program, this file is the child's: one `Endpoint` that
does what it is told and reports its events.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from transfer_endpoint import WAIT_SECONDS, Endpoint, EventLog, TorchBlocks

from tandem.core.config import TransferConfig
from tandem.v1 import worker_pb2


class PeerProcess:
    """Starts the child and is its peer; when its stream ends, closes the links as a worker does."""

    def __init__(self, here: Endpoint, blocks: dict[str, Any] | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()
        self.events = EventLog()
        """The child's events."""
        self.kv: list[torch.Tensor] = []
        self.announced = threading.Event()
        self.transfer = here.connect("child", self._send_link)
        self._reader = threading.Thread(target=self._read, name="child-reader", daemon=True)
        self._reader.start()
        self.tell("start", blocks or {}, here.config.model_dump())

    def tell(self, *command: Any) -> None:
        with self._lock:
            self._connection.send(command)

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_SECONDS)
        self._reader.join(WAIT_SECONDS)

    def read_kv(self) -> torch.Tensor:
        """All of the child's blocks."""
        self.tell("read")
        self.events.wait_for(lambda: bool(self.kv))
        return self.kv.pop()

    def _send_link(self, message: worker_pb2.LinkMessage) -> None:
        self.tell("link", message.SerializeToString())
        if message.HasField("announce"):
            self.announced.set()

    def _read(self) -> None:
        while True:
            try:
                kind, *values = self._connection.recv()
            except (EOFError, ConnectionError):
                self.transfer.close()
                return
            if kind == "link":
                self.transfer.handle(worker_pb2.LinkMessage.FromString(values[0]))
            elif kind == "kv":
                self.kv.append(torch.tensor(values[0]))
                self.events.receives_closed(-1)  # wakes `read_kv`
            else:
                getattr(self.events, kind)(*values)


class _Reporter:
    """The child's `TransferEvents`: everything goes to the parent."""

    def __init__(self, tell: Any) -> None:
        self._tell = tell

    def piece_landed(self, *values: Any) -> None:
        self._tell("piece_landed", *values)

    def sends_closed(self, leg_id: int, error: str | None) -> None:
        self._tell("sends_closed", leg_id, error)

    def receives_closed(self, leg_id: int) -> None:
        self._tell("receives_closed", leg_id)

    def link_failed(self, leg_ids: Sequence[int], reason: str) -> None:
        self._tell("link_failed", list(leg_ids), reason)


def main() -> None:
    """The child: obeys until it is told to exit or its parent is gone."""
    torch.set_num_threads(1)
    connection, lock = Connection(int(sys.argv[1])), threading.Lock()

    def tell(*report: Any) -> None:
        with lock:
            connection.send(report)

    _, blocks, config = connection.recv()
    end = Endpoint("child", TorchBlocks(**blocks), TransferConfig(**config))
    end.events = _Reporter(tell)  # type: ignore[assignment]
    transfer = end.connect("parent", lambda message: tell("link", message.SerializeToString()))
    while True:
        try:
            kind, *values = connection.recv()
        except EOFError:
            kind = "exit"
        if kind == "exit":
            return  # links stay open: leaving must not hang on them
        if kind == "link":
            transfer.handle(worker_pb2.LinkMessage.FromString(values[0]))
        elif kind == "expect":
            transfer.expect(values[0], values[1], end.slots(values[2]))
        elif kind == "piece":
            transfer.send(end.piece(*values))
        elif kind == "read":
            tell("kv", end.blocks.kv.tolist())
        else:
            getattr(transfer, kind)(*values)


if __name__ == "__main__":
    main()
