"""Carries out the copies between the device's KV blocks and those in host memory.

In a thread of its own, on CUDA on a stream of its own, so that the engine thread only hands copies
over and hears of their ends. Copies run one after the other in the order of `submit`; whose blocks
they touch is the host tier's business, which holds them until the end is reported.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import structlog
import torch

from tandem.kvcache.host_tier import BlockCopy
from tandem.kvcache.storage import HostStorage

log = structlog.get_logger(__name__)

Done = Callable[[BlockCopy, float, bool], None]
"""Hears of a copy's end: seconds that it took, and whether it succeeded."""


class HostCopier:
    """One copy thread, which ends with the process."""

    def __init__(self, name: str, storage: HostStorage, device: torch.device, done: Done) -> None:
        self._storage = storage
        self._device = device
        self._done = done
        self._copies: queue.SimpleQueue[tuple[BlockCopy, torch.cuda.Event | None]]
        self._copies = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"{name}-host-copies", daemon=True).start()

    def submit(self, copy: BlockCopy, ready: torch.cuda.Event | None) -> None:
        """Queue a copy, to begin after `ready`: what has been written so far is written by then."""
        self._copies.put((copy, ready))

    def _run(self) -> None:
        stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        while True:
            copy, ready = self._copies.get()
            began, succeeded = time.monotonic(), True
            try:
                self._carry_out(copy, ready, stream)
            except Exception:
                log.exception("copy between device and host failed", kind=copy.kind)
                succeeded = False
            self._done(copy, time.monotonic() - began, succeeded)

    def _carry_out(
        self, copy: BlockCopy, ready: torch.cuda.Event | None, stream: torch.cuda.Stream | None
    ) -> None:
        with torch.cuda.stream(stream):  # None: where there is no CUDA, nothing
            if stream is not None and ready is not None:
                stream.wait_event(ready)
            if copy.to_host:
                self._storage.copy_out(copy.device_blocks, copy.host_blocks)
            else:
                self._storage.copy_in(copy.host_blocks, copy.device_blocks)
            if stream is not None:
                stream.synchronize()
