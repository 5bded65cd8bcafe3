"""Counters of one peer's KV traffic. Written by transfer threads, read by anyone."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class TransferStats:
    """A snapshot. Seconds are those in which pieces were on their way, several at a time or one.

    A sender counts them until the acknowledgement, a receiver until the bytes are there.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    send_seconds: float = 0.0
    receive_seconds: float = 0.0
    pieces_sent: int = 0
    pieces_landed: int = 0
    pieces_drained: int = 0
    """Received into scratch: the leg was cancelled or finished, or the piece had landed before."""
    stale_messages: int = 0
    """Refused because they were stamped with another epoch."""
    retries: int = 0
    """Times a broken link was rebuilt."""


class TransferCounters:
    """The running totals behind `TransferStats`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = TransferStats()

    def sent(self, nbytes: int, pieces: int) -> None:
        with self._lock:
            now = self._stats
            self._stats = replace(
                now, bytes_sent=now.bytes_sent + nbytes, pieces_sent=now.pieces_sent + pieces
            )

    def acknowledged(self, seconds: float) -> None:
        with self._lock:
            self._stats = replace(self._stats, send_seconds=self._stats.send_seconds + seconds)

    def received(self, nbytes: int, seconds: float, *, landed: bool) -> None:
        with self._lock:
            now = self._stats
            self._stats = replace(
                now,
                bytes_received=now.bytes_received + nbytes,
                receive_seconds=now.receive_seconds + seconds,
                pieces_landed=now.pieces_landed + landed,
                pieces_drained=now.pieces_drained + (not landed),
            )

    def stale(self) -> None:
        with self._lock:
            self._stats = replace(self._stats, stale_messages=self._stats.stale_messages + 1)

    def retried(self) -> None:
        with self._lock:
            self._stats = replace(self._stats, retries=self._stats.retries + 1)

    def snapshot(self) -> TransferStats:
        with self._lock:
            return self._stats
