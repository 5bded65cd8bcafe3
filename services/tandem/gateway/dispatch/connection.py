"""How the gateway connects to its peers, and connects again: channels, pace, and what is logged.

Invariant: a peer that is away is tried for as long as it is wanted, with growing delays, and the
log says when it is lost, why, and when it is back, not every try.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import grpc
import structlog

log = structlog.get_logger(__name__)

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


class Reconnection:
    """One connection that is wanted for as long as there is its peer::

    lost (or not there yet) --up--> connected --down--> lost
    """

    def __init__(self, rng: random.Random, connection: str, **peer: str | int) -> None:
        """`connection` and `peer` name it in the log."""
        self._backoff = Backoff(rng)
        self._names = {"connection": connection, **peer}
        self._connected = False
        self._told = ""

    def up(self, **details: str | int) -> None:
        """The peer has answered. Of no effect while it is connected but for a short next delay."""
        self._backoff.reset()
        if not self._connected:
            log.info("connected", **self._names, **details)
        self._connected, self._told = True, ""

    def down(self, detail: str) -> None:
        """It is lost, or could not be made. Logged when that, or why, is news."""
        if detail != self._told:
            log.warning("connection lost", **self._names, detail=detail)
        self._connected, self._told = False, detail

    def next_delay(self) -> float:
        """Return the seconds to wait before the next try."""
        return self._backoff.next()

    async def keep(self, connect: Callable[[], Awaitable[str]]) -> None:
        """Connect again and again until cancelled.

        `connect` calls `up` when the peer answers, lasts as long as the connection, and returns
        why it is over; nothing, if there is nothing wrong.
        """
        while True:
            try:
                cause = await connect()
            except grpc.aio.AioRpcError as error:
                cause = describe(error)
            except Exception as error:  # a bug in taking one message must not end the trying
                log.exception("message not taken", **self._names)
                cause = f"{type(error).__name__}: {error}"
            if cause:
                self.down(cause)
            await asyncio.sleep(self.next_delay())


def describe(error: grpc.aio.AioRpcError) -> str:
    """Return a failed call's status and what the peer said of it."""
    return f"{error.code().name}: {error.details()}"
