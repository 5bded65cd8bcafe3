"""Protobuf messages over one TCP connection, each after its length.

Any thread may send; one thread receives. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import suppress

from google.protobuf.message import Message

_LENGTH = struct.Struct("!I")


class ChannelClosedError(Exception):
    """The connection is gone, or was silent for too long."""


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._socket = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send one message. Raises `ChannelClosedError`."""
        body = message.SerializeToString()
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise ChannelClosedError(str(error)) from error

    def receive(self, timeout: float | None) -> bytes:
        """Return the next message. Raises `ChannelClosedError`, also after `timeout` seconds in
        which nothing came."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, timeout))
        return self._read(length, timeout)

    def close(self) -> None:
        """End the connection; who waits for it at either end hears of it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, count: int, timeout: float | None) -> bytes:
        parts = bytearray()
        try:
            while len(parts) < count:
                self._wait(timeout)
                part = self._socket.recv(count - len(parts))
                if not part:
                    raise ChannelClosedError("the connection ended")
                parts += part
        except (OSError, ValueError) as error:  # ValueError: closed here meanwhile
            raise ChannelClosedError(str(error)) from error
        return bytes(parts)

    def _wait(self, timeout: float | None) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if poll.poll(None if timeout is None else timeout * 1000):
            return
        # This process may have been frozen itself: then what was sent meanwhile is here now.
        if not poll.poll(0):
            raise ChannelClosedError(f"silent for {timeout:g} s")
