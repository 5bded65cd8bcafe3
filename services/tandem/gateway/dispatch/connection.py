"""How the gateway connects to its peers: channel options and the pace of reconnecting."""

from __future__ import annotations

import random

import grpc

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A peer whose host is gone answers no ping; a frozen process is the watchdog's business.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Each channel has connections of its own: one that is backing off holds up no other.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """Return a plaintext channel to `host:port`. It connects on first use; the caller closes it."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


class Backoff:
    """Delays that double from `first` to `last` seconds, each cut by up to half at random."""

    def __init__(self, rng: random.Random, first: float = 0.1, last: float = 2.0) -> None:
        self._rng = rng
        self._first = first
        self._last = last
        self._delay = first

    def next(self) -> float:
        """Return the seconds to wait before the next try."""
        delay = self._delay * self._rng.uniform(0.5, 1.0)
        self._delay = min(self._delay * 2, self._last)
        return delay

    def reset(self) -> None:
        """Start again with short delays, after a success."""
        self._delay = self._first
