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
import time
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

_NCCL_MAX_CTAS = 4
"""Each NCCL channel costs some 6 MB of GPU memory per group and takes an SM from the model."""
_POLL_SECONDS = 0.0002
_MEET_POLL_SECONDS = 0.002
_DATA_TAG = 0
_ABORT_TAG = 1


class LinkError(TandemError):
    """A link broke: time-out, lost connection, abort, or a message out of order."""


class LinkGroup(Protocol):
    """One epoch's group. After any error it is dead."""

    def send(self, buffer: torch.Tensor, timeout: float) -> None:
        """Send a contiguous uint8 tensor to rank 1. Raises `LinkError`."""

    def recv(self, buffer: torch.Tensor, timeout: float) -> None:
        """Receive into a contiguous uint8 tensor from rank 0. Raises `LinkError`."""

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


def meet(store: Store, rank: int, timeout: float, alive: Callable[[], bool]) -> None:
    """Wait until the other rank is in the store too, so that making the group takes no time.

    A group's constructor cannot be interrupted; this can: it raises `LinkError` when `alive` turns
    false, and after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    store.set(f"rank{rank}", "here")
    while not store.check([f"rank{1 - rank}"]):
        if not alive():
            raise LinkError("aborted while it was being opened")
        if time.monotonic() > deadline:
            raise LinkError(f"the peer did not come to open the link within {timeout:g} s")
        time.sleep(_MEET_POLL_SECONDS)


def open_group(
    backend: Backend,
    store: Store,
    rank: int,
    host: str,
    device: torch.device,
    timeout: float,
) -> LinkGroup:
    """Make the group of two ranks that have met. Blocks `timeout` s if one is gone again."""
    if backend == "nccl":
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

    def send(self, buffer: torch.Tensor, timeout: float) -> None:
        try:
            self._group.send([buffer], self._peer, _DATA_TAG).wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise self._explain(error) from error

    def recv(self, buffer: torch.Tensor, timeout: float) -> None:
        try:
            self._group.recv([buffer], self._peer, _DATA_TAG).wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise self._explain(error) from error

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

    def _explain(self, error: RuntimeError) -> LinkError:
        return LinkError("aborted" if self._aborted.is_set() else _gist(error))


class NcclGroup:
    """Over NCCL, from and into GPU memory.

    The communicator is made by the first operation. Completion is polled, so that `abort` or the
    deadline ends the wait whatever the peer does; the group's own watchdog, which would end the
    process, is switched off.
    """

    def __init__(self, store: Store, rank: int, device: torch.device) -> None:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = _NCCL_MAX_CTAS
        self._peer = 1 - rank
        self._group = dist.ProcessGroupNCCL(store, rank, 2, options)
        self._aborted = threading.Event()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, buffer: torch.Tensor, timeout: float) -> None:
        self._run(self._group.send, buffer, timeout)

    def recv(self, buffer: torch.Tensor, timeout: float) -> None:
        self._run(self._group.recv, buffer, timeout)

    def abort(self) -> None:
        """In a thread: tearing a communicator down takes NCCL up to some 100 ms."""
        if self._aborted.is_set():
            return
        self._aborted.set()
        threading.Thread(target=self._group.abort, name="nccl-abort", daemon=True).start()

    def _run(self, operation: Any, buffer: torch.Tensor, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.device(buffer.device), torch.cuda.stream(self._stream):
                operation([buffer], self._peer, _DATA_TAG).wait()
                done.record(self._stream)
            while not done.query():  # type: ignore[no-untyped-call]
                if self._aborted.is_set():
                    raise LinkError("aborted")
                if time.monotonic() > deadline:
                    raise LinkError(f"timed out after {timeout:g} s")
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise LinkError(_gist(error)) from error
        if self._aborted.is_set():
            raise LinkError("aborted")


def _gist(error: RuntimeError) -> str:
    """What happened, without the source line before it and the advice after it."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", text).split(". This is typically")[0]
