"""Ports for servers that a test starts later, or never."""

from __future__ import annotations

import secrets
import socket
from contextlib import ExitStack

UNASSIGNED = range(20_000, 32_000)
"""Below the ports that Linux and macOS hand to whoever asks for any: nobody takes one by chance
between the moment in which it is found free and the one in which the test's server binds it."""


def free_ports(count: int) -> list[int]:
    """Return different ports of this machine that nobody has bound."""
    ports: list[int] = []
    with ExitStack() as probes:
        while len(ports) < count:
            probe = probes.enter_context(socket.socket())
            # As servers do, so that connections of an earlier run in TIME_WAIT do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port = secrets.choice(UNASSIGNED)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            if port not in ports:
                ports.append(port)
    return ports


def free_port() -> int:
    """Return one of them."""
    return free_ports(1)[0]
