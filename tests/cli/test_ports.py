"""Ports kept between their check and the start of the servers."""

from __future__ import annotations

import socket
import sys

import grpc
import pytest

from free_ports import free_ports
from tandem.commands.ports import held_ports
from tandem.core.config import ControllerConfig, GatewayConfig, TandemConfig
from tandem.core.errors import UnavailableError
from tandem.gateway.server import bind

HOST = "127.0.0.1"


@pytest.fixture
def config() -> TandemConfig:
    http, grpc_port, controller, metrics = free_ports(4)
    return TandemConfig(
        gateway=GatewayConfig(
            host=HOST, port=http, grpc_port=grpc_port, processes=2, metrics_port=metrics
        ),
        controller=ControllerConfig(host=HOST, port=controller),
    )


def is_free(port: int) -> bool:
    """Whether somebody who asks for it, or for any port, could get it."""
    with socket.socket() as stranger:
        try:
            stranger.bind((HOST, port))
        except OSError:
            return False
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="ports are held on Linux only")
def test_a_held_port_is_nobodys_but_the_servers(config: TandemConfig) -> None:
    gateway = config.gateway
    metrics = [gateway.metrics_port, gateway.metrics_port + 1]
    ports = [gateway.port, gateway.grpc_port, config.controller.port, *metrics]
    assert all(map(is_free, ports))
    with held_ports(config):
        assert not any(map(is_free, ports))
        for shared in (False, True):
            bind(HOST, gateway.port, shared=shared).close()
        with bind(HOST, gateway.port, shared=True), bind(HOST, gateway.port, shared=True):
            pass
    assert all(map(is_free, ports))


def test_a_grpc_server_listens_on_a_held_port(config: TandemConfig) -> None:
    port = config.gateway.grpc_port
    with held_ports(config):
        for shared in (0, 1):
            server = grpc.server(None, options=[("grpc.so_reuseport", shared)])
            assert server.add_insecure_port(f"{HOST}:{port}") == port
            server.start()
            server.stop(None).wait()


def test_a_port_that_was_taken_before_it_is_held_is_named(config: TandemConfig) -> None:
    with (
        bind(HOST, config.controller.port),
        pytest.raises(UnavailableError, match=f"port {config.controller.port} .--controller-port"),
        held_ports(config),
    ):
        pass
