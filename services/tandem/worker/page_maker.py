"""Makes the memory pages of KV blocks before they are needed.

On CPUs the pages of a block are taken from the machine when it is first written, and the kernel
clears them then: some milliseconds for each huge page, of which one block may touch two per layer.
A decode iteration whose sequences came to new pages took three times as long as its neighbours. A
thread of low priority clears them some way ahead of the blocks that are in use.
"""

from __future__ import annotations

import os
import threading

import structlog

from tandem.kvcache.storage import KVStorage

log = structlog.get_logger(__name__)

_BYTES_AHEAD = 128 << 20
"""Of blocks that nobody has used yet: ten thousand tokens of a model of half a billion weights."""
_STEP_BYTES = 8 << 20
"""Made at once: what `stop` may have to wait for."""
_NICENESS = 10


class PageMaker:
    """One thread, until `stop`. `used` never waits for it."""

    def __init__(self, name: str, storage: KVStorage) -> None:
        block_bytes = storage.bytes_per_token * storage.block_size
        self._name = name
        self._storage = storage
        self._ahead = -(-_BYTES_AHEAD // block_bytes)
        self._step = -(-_STEP_BYTES // block_bytes)
        self._made = 0
        self._wanted = 0
        self._stopped = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name=f"{name}-pages", daemon=True).start()
        self.used(0)

    def used(self, num_blocks: int) -> None:
        """Note that the first `num_blocks` blocks are, or were, in use."""
        wanted = min(num_blocks + self._ahead, self._storage.num_blocks)
        enough = wanted - self._wanted >= self._step or wanted == self._storage.num_blocks
        if enough and wanted > self._wanted:
            with self._changed:
                self._wanted = wanted
                self._changed.notify()

    def stop(self) -> None:
        """End the thread after what it is making now."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while self._made < self._storage.num_blocks:
            with self._changed:
                self._changed.wait_for(lambda: self._made < self._wanted or self._stopped)
                if self._stopped:
                    return
                end = min(self._wanted, self._made + self._step)
            if not self._storage.make_pages(self._made, end):
                log.info("KV pages are made when they are first written", worker=self._name)
                return
            self._made = end
