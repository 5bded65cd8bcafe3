"""Two-rank process groups: how bytes of one link epoch get from rank 0 to rank 1.

The only module that touches torch.distributed. Each epoch has a group of its own, met through its
own prefix in the opener's store; there is no global group. Every call here may block and is made
from a transfer thread, except `abort`, which anyone may call at any time.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed

from tandem.core.errors import TandemError
from tandem.transfer.spec import Backend

dist: Any = torch.distributed  # its stubs lack most of what is used here
Store = Any

DATA_TAG = 0
_ABORT_TAG = 1


class LinkError(TandemError):
    """A link broke: time-out, lost connection, abort, or a message out of order."""


class Transfer(Protocol):
    """A send or receive that was posted. Its buffer is in use until it is complete."""

    def wait(self, timeout: float) -> None:
        """Block until it is complete. Raises `LinkError`."""


class LinkGroup(Protocol):
    """One epoch's group. After any error it is dead.

    What is posted is transferred in order, each after the one before.
    """

    def post_send(self, buffer: torch.Tensor) -> Transfer:
        """Start to send a contiguous uint8 tensor to rank 1. Raises `LinkError`."""

    def post_recv(self, buffer: torch.Tensor) -> Transfer:
        """Start to receive into a contiguous uint8 tensor from rank 0. Raises `LinkError`."""

    def abort(self) -> None:
        """Kill the group: every operation on it, here and at the peer, fails promptly."""


class Rendezvous:
    """This worker's address for links, and the store in which peers meet it.

    One TCPStore server per worker, started on first use and bound to `host` only. Each epoch gets a
    client of its own: a client serves one blocking call at a time.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self._lock = threading.Lock()
        self._server: Any = None

    def port(self) -> int:
        """Port of the store, which is started if it is not yet."""
        return int(self._serve().port)

    def forget(self, prefix: str) -> None:
        """Delete what an epoch left in the store."""
        server = self._serve()
        for key in server.list_keys():
            if key.startswith(prefix + "/"):
                server.delete_key(key)

    def _serve(self) -> Any:
        with self._lock:
            if self._server is None:
                family = socket.getaddrinfo(self.host, 0, type=socket.SOCK_STREAM)[0][0]
                with socket.socket(family, socket.SOCK_STREAM) as listener:
                    listener.bind((self.host, 0))
                    listener.listen(128)
                    self._server = dist.TCPStore(
                        self.host,
                        listener.getsockname()[1],
                        is_master=True,
                        wait_for_workers=False,
                        master_listen_fd=os.dup(listener.fileno()),
                    )
            return self._server


def connect_store(host: str, port: int, prefix: str, timeout: float) -> Store:
    """A client of the opener's store that sees only one epoch."""
    client = dist.TCPStore(
        host, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False
    )
    return dist.PrefixStore(prefix, client)


def open_group(
    backend: Backend,
    store: Store,
    rank: int,
    host: str,
    device: torch.device,
    timeout: float,
) -> LinkGroup:
    """Make the group of two ranks that are both about to; cannot be interrupted.

    Blocks `timeout` seconds if the other is gone again. Raises `LinkError`.
    """
    if backend == "nccl":
        from tandem.transfer.nccl_group import NcclGroup

        return NcclGroup(store, rank, device)
    return GlooGroup(store, rank, host, timeout)


class GlooGroup:
    """Over TCP, from and into host memory."""

    def __init__(self, store: Store, rank: int, host: str, timeout: float) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        self._peer = 1 - rank
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        self._aborted = threading.Event()

    def post_send(self, buffer: torch.Tensor) -> Transfer:
        return self._post(self._group.send, buffer)

    def post_recv(self, buffer: torch.Tensor) -> Transfer:
        return self._post(self._group.recv, buffer)

    def abort(self) -> None:
        """Gloo's own `abort` leaves blocked operations blocked, but a wait that times out closes
        the connection for good and fails whatever else waits on it. So: one such wait, of 1 ms.
        """
        if self._aborted.is_set():
            return
        self._aborted.set()
        scratch = torch.empty(1, dtype=torch.uint8)
        with suppress(RuntimeError):
            self._group.recv([scratch], self._peer, _ABORT_TAG).wait(timedelta(milliseconds=1))

    def _post(self, operation: Callable[..., Any], buffer: torch.Tensor) -> Transfer:
        if self._aborted.is_set():
            raise LinkError("aborted")
        try:
            return _GlooTransfer(operation([buffer], self._peer, DATA_TAG), buffer, self.explain)
        except RuntimeError as error:
            raise self.explain(error) from error

    def explain(self, error: RuntimeError) -> LinkError:
        return LinkError("aborted" if self._aborted.is_set() else gist(error))


class _GlooTransfer:
    """Keeps its buffer, which gloo only borrows."""

    def __init__(
        self, work: Any, buffer: torch.Tensor, explain: Callable[[RuntimeError], LinkError]
    ) -> None:
        self._work = work
        self._buffer = buffer
        self._explain = explain

    def wait(self, timeout: float) -> None:
        try:
            self._work.wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise self._explain(error) from error


def gist(error: RuntimeError) -> str:
    """What happened, without the source line before it and the advice after it."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", text).split(". This is typically")[0]
