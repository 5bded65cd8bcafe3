"""`tandem gateway --gateways N`: several processes on one port, kept running, ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import httpx
import psutil
import pytest

from free_ports import free_port, free_ports
from tandem.commands.ports import settle_metrics_ports
from tandem.core.config import GatewayConfig, TandemConfig
from tandem.core.errors import ConfigError, UnavailableError

from .conftest import Run

SECONDS = 40.0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def config(**gateway: int) -> TandemConfig:
    return TandemConfig(gateway=GatewayConfig(**gateway))


@pytest.mark.timeout(180)
def test_a_gateway_that_is_killed_is_replaced_and_all_end_together() -> None:
    settled = settle_metrics_ports(config(processes=2, metrics_port=free_port())).gateway
    own = [settled.metrics_port, settled.metrics_port + 1]
    port, grpc_port, controller = free_ports(3)
    command = [sys.executable, "-m", "tandem", "gateway", "--gateways", "2"]
    command += ["--port", str(port), "--grpc-port", str(grpc_port), "--metrics-port", str(own[0])]
    command += ["--controller", f"127.0.0.1:{controller}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        eventually(lambda: all(map(alive, own)))
        assert alive(port)
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        assert process.stdout is not None
        os.kill(children[1].pid, signal.SIGKILL)
        eventually(
            lambda: process.poll() is not None or "starting it again" in process.stdout.readline()
        )
        eventually(lambda: all(map(alive, own)))
        replaced = psutil.Process(process.pid).children()
        assert children[0] in replaced
        assert children[1] not in replaced
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert not psutil.wait_procs(replaced, timeout=SECONDS)[1]


def test_metrics_ports_must_be_free_and_differ_from_the_others(
    run_tandem: Run, busy_port: int
) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.metrics_port takes 7999 to 8000"):
        settle_metrics_ports(config(processes=2, metrics_port=7999))
    with pytest.raises(UnavailableError, match=f"port {busy_port} .--metrics-port"):
        settle_metrics_ports(config(processes=2, metrics_port=busy_port - 1))
    assert settle_metrics_ports(config(metrics_port=busy_port)).gateway.metrics_port == busy_port
