"""A link epoch's group over NCCL, from and into GPU memory.

Nothing here polls: a thread waits in the driver for one posted operation after the other, and wakes
whoever waits for it; an abort or a deadline wakes them whatever the GPU does.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from tandem.transfer.group import DATA_TAG, LinkError, Store, Transfer, dist, gist

_MAX_CTAS = 4
"""Each NCCL channel costs some 6 MB of GPU memory per group and takes an SM from the model. Set per
communicator, as `NCCL_MAX_CTAS` would cap the groups of a worker's tensor parallelism too."""


class NcclGroup:
    """Two ranks over NCCL. The communicator is made by the first operation.

    The group's own watchdog, which would end the process, is switched off.
    """

    def __init__(self, store: Store, rank: int, device: torch.device) -> None:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = _MAX_CTAS
        self._peer = 1 - rank
        self._group = dist.ProcessGroupNCCL(store, rank, 2, options)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._changed = threading.Condition()
        self._aborted = False
        self._posted: queue.SimpleQueue[_NcclTransfer | None] = queue.SimpleQueue()
        self._waiter: threading.Thread | None = None

    def post_send(self, buffer: torch.Tensor) -> Transfer:
        return self._post(self._group.send, buffer)

    def post_recv(self, buffer: torch.Tensor) -> Transfer:
        return self._post(self._group.recv, buffer)

    def abort(self) -> None:
        """In a thread: tearing a communicator down takes NCCL up to some 100 ms."""
        with self._changed:
            if self._aborted:
                return
            self._aborted = True
            self._changed.notify_all()
        self._posted.put(None)
        threading.Thread(target=self._group.abort, name="nccl-abort", daemon=True).start()

    def _post(self, operation: Callable[..., Any], buffer: torch.Tensor) -> Transfer:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.device(buffer.device), torch.cuda.stream(self._stream):
                operation(
                    [buffer], self._peer, DATA_TAG
                ).wait()  # orders the stream, not this thread
                done.record(self._stream)
        except RuntimeError as error:
            raise LinkError(gist(error)) from error
        transfer = _NcclTransfer(done, buffer, self._changed, lambda: self._aborted)
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._complete, name="nccl-wait", daemon=True)
            self._waiter.start()
        self._posted.put(transfer)
        return transfer

    def _complete(self) -> None:
        """The waiter: ends with the abort, which also ends the operations it may be waiting for."""
        while (transfer := self._posted.get()) is not None:
            transfer.complete()


class _NcclTransfer:
    """One operation. Keeps its buffer until it is complete."""

    def __init__(
        self,
        done: torch.cuda.Event,
        buffer: torch.Tensor,
        changed: threading.Condition,
        aborted: Callable[[], bool],
    ) -> None:
        self._done = done
        self._buffer = buffer
        self._changed = changed
        self._aborted = aborted
        self._finished = False
        self._error: str | None = None

    def complete(self) -> None:
        """Wait for the GPU, without a limit, and say so. Called by the waiter."""
        error = None
        try:
            self._done.synchronize()
        except RuntimeError as failure:
            error = gist(failure)
        with self._changed:
            self._finished, self._error = True, error
            self._changed.notify_all()

    def wait(self, timeout: float) -> None:
        with self._changed:
            ended = self._changed.wait_for(lambda: self._finished or self._aborted(), timeout)
            if self._aborted():
                raise LinkError("aborted")
            if not ended:
                raise LinkError(f"timed out after {timeout:g} s")
            if self._error is not None:
                raise LinkError(self._error)
