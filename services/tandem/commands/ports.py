"""Ports: checked before anything starts, so that a busy one is told in a sentence.

A check is not a reservation: `held_ports` makes one, for Ray's processes take free ports while they
start. Where nobody holds them, servers still report a port that was taken in between.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tandem.config import FLAGS
from tandem.core.config import GatewayConfig, TandemConfig
from tandem.core.errors import ConfigError, UnavailableError

MAX_PORT = 65535
TRIES = 50


def settle_ports(config: TandemConfig, settings: Mapping[str, tuple[str, int]]) -> TandemConfig:
    """Check each `setting -> (host, port)` and replace port 0 by a free one.

    Raises `ConfigError` if two settings name one port, `UnavailableError` if a port is in use.
    """
    taken: dict[int, str] = {}
    for setting, (host, port) in settings.items():
        if port in taken:
            raise ConfigError(f"{taken[port]} and {setting} are both {port}; they must differ")
        settled = _check(setting, host, port)
        taken[settled] = setting
        section, _, field = setting.partition(".")
        changed = getattr(config, section).model_copy(update={field: settled})
        config = config.model_copy(update={section: changed})
    return config


def serve_ports(config: TandemConfig, *, dashboard: bool) -> dict[str, tuple[str, int]]:
    """Every port that `tandem serve` listens on."""
    gateway, controller = config.gateway, config.controller
    ports = {
        "gateway.port": (gateway.host, gateway.port),
        "gateway.grpc_port": (gateway.host, gateway.grpc_port),
        "controller.port": (controller.host, controller.port),
    }
    if dashboard:
        ports["controller.dashboard_port"] = ("127.0.0.1", controller.dashboard_port)
    return ports


def settle_metrics_ports(config: TandemConfig) -> TandemConfig:
    """Check the ports on which each of several gateways answers alone; 0 becomes free ones.

    Raises `ConfigError` if one is also another setting's, `UnavailableError` if one is in use.
    """
    gateway = config.gateway
    if gateway.processes == 1:
        return config
    first = gateway.metrics_port or _free_row(gateway.host, gateway.processes)
    settled = gateway.model_copy(update={"metrics_port": first})
    row = _metrics_ports(settled)
    for setting, (_, port) in serve_ports(config, dashboard=True).items():
        if port in row:
            raise ConfigError(
                f"gateway.metrics_port takes {row[0]} to {row[-1]}, and {setting} is {port}; "
                "they must differ"
            )
    if row[-1] > MAX_PORT:
        raise ConfigError(f"gateway.metrics_port must leave room for {len(row)} ports, got {first}")
    for port in row:
        _check("gateway.metrics_port", gateway.host, port)
    return config.model_copy(update={"gateway": settled})


@contextmanager
def held_ports(config: TandemConfig) -> Iterator[None]:
    """Keep the ports of gateway and controller from being handed to anyone who asks for any port.

    A socket that is bound and does not listen does that, on Linux, and leaves the port to a server
    that sets SO_REUSEADDR, as ours do. Raises `UnavailableError` if a port is in use.
    """
    with ExitStack() as held:
        if sys.platform == "linux":
            for setting, (host, port) in _own_ports(config):
                held.enter_context(_bound(setting, host, port))
        yield


def _own_ports(config: TandemConfig) -> Iterator[tuple[str, tuple[str, int]]]:
    yield from serve_ports(config, dashboard=False).items()
    gateway = config.gateway
    if gateway.processes > 1:
        for port in _metrics_ports(gateway):
            yield "gateway.metrics_port", (gateway.host, port)


def _metrics_ports(gateway: GatewayConfig) -> range:
    """Those on which each of several gateways answers alone."""
    return range(gateway.metrics_port, gateway.metrics_port + gateway.processes)


def _free_row(host: str, count: int) -> int:
    """Return the first of `count` free ports in a row."""
    for _ in range(TRIES):
        first = _check("gateway.metrics_port", host, 0)
        try:
            for port in range(first + 1, min(first + count, MAX_PORT + 1)):
                _check("gateway.metrics_port", host, port)
        except UnavailableError:
            continue
        return first
    raise UnavailableError(f"there are no {count} free ports in a row (--metrics-port)")


def _check(setting: str, host: str, port: int) -> int:
    with _bound(setting, host, port) as probe:
        return int(probe.getsockname()[1])


def _bound(setting: str, host: str, port: int) -> socket.socket:
    flag = FLAGS[setting]
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        probe = socket.socket(family, kind)
        try:
            # As servers do, so that connections of an earlier run in TIME_WAIT do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
        except OSError:
            probe.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UnavailableError(
                f"port {port} ({flag}) is in use by another program; choose another with {flag}"
            ) from error
        raise UnavailableError(
            f"cannot listen on {host}:{port} ({flag}): {error.strerror or error}"
        ) from error
    return probe
