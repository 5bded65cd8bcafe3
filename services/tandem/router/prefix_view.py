"""What the workers of a pool hold of a prompt, on their devices and in host memory. Pure.

Two sources: what this router dispatched, known at once and uncertain, and what workers report, late
and true. A report takes back what it contradicts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.core.prefix_events import KEY_BYTES, PrefixEvents
from tandem.router.prefix_index import PrefixIndex

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


def keys_of(hashes: Sequence[bytes]) -> list[bytes]:
    """Return what blocks are called here and in reports."""
    return [block_hash[:KEY_BYTES] for block_hash in hashes]


class PrefixView:
    """The blocks of every worker of a pool; workers are numbers, blocks are keys."""

    def __init__(self, capacity: int) -> None:
        self._device = PrefixIndex(capacity)
        self._both = PrefixIndex(2 * capacity)  # of workers with a host tier only
        self._in_host: dict[int, set[bytes]] = {}
        self._host_value: dict[int, float] = {}

    def match(self, worker: int, keys: Sequence[bytes]) -> float:
        """Return how many of the first `keys` in a row a worker has, those in host memory counted
        by what they save."""
        on_device = self._device.match(worker, keys)
        if worker not in self._in_host:
            return on_device
        further = max(0, self._both.match(worker, keys) - on_device)
        return on_device + self._host_value[worker] * further

    def depths(self, keys: Sequence[bytes], num_workers: int) -> Floats:
        """Return `match` of workers 0 to `num_workers` - 1, all at once."""
        depths: Floats = self._device.depths(keys, num_workers).astype(np.float64)
        if not self._in_host:
            return depths
        values = np.zeros(num_workers)
        for worker, value in self._host_value.items():
            if worker < num_workers:
                values[worker] = value
        further = np.maximum(0, self._both.depths(keys, num_workers) - depths)
        result: Floats = depths + values * further
        return result

    def expected(self, worker: int, keys: Sequence[bytes]) -> None:
        """A worker holds these blocks, or is about to, by what this router has heard."""
        self._device.record(worker, keys)
        if worker in self._in_host:
            self._both.record(worker, keys)

    def unexpected(self, worker: int, keys: Sequence[bytes]) -> None:
        """A worker will not hold these blocks on its device after all."""
        self._device.drop(worker, keys)
        if worker in self._in_host:
            self._both.drop(worker, [key for key in keys if key not in self._in_host[worker]])

    def reported(self, worker: int, events: PrefixEvents) -> None:
        """A worker says what became of its blocks."""
        if events.reset:
            self.forget(worker)
        self._device.record(worker, events.stored[::-1])
        self._device.drop(worker, events.evicted)
        in_host = self._in_host.get(worker)
        if in_host is None:
            if not events.host_stored:
                return
            in_host = self._in_host[worker] = set()
            self._both.record(worker, self._device.all_of(worker)[::-1])
        self._host_value[worker] = events.host_value
        in_host.update(events.host_stored)
        in_host.difference_update(events.host_evicted)
        self._both.record(worker, (events.stored + events.host_stored)[::-1])
        gone = [key for key in events.evicted if key not in in_host]
        gone += [key for key in events.host_evicted if not self._device.has(worker, key)]
        self._both.drop(worker, gone)

    def forget(self, worker: int) -> None:
        """A worker is gone, or starts over, and what it held with it."""
        self._device.forget(worker)
        self._both.forget(worker)
        self._in_host.pop(worker, None)
        self._host_value.pop(worker, None)
