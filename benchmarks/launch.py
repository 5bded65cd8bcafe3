"""Starts `tandem serve` as a person would, waits until it serves, and always stops it.

The cluster runs in a session of its own, so that ctrl-C reaches this process alone, which then
interrupts the cluster and waits for it to leave.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

import grpc
import psutil
import yaml

from benchmarks.scrape import cluster_status
from tandem.core.config import TandemConfig
from tandem.v1 import cluster_pb2

HOST = "127.0.0.1"
READY_TIMEOUT = 180.0
STOP_TIMEOUT = 45.0
POLL_INTERVAL = 0.25
LOG_TAIL_BYTES = 4000


class ClusterError(Exception):
    """The cluster did not start; the message holds the end of what it printed."""


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that answers."""

    pid: int
    host: str
    port: int
    controller_address: str
    metrics_addresses: tuple[str, ...]
    worker_niceness: int
    """The lowest priority of a worker, where every process has 0 unless told otherwise."""
    start_seconds: float


@contextmanager
def running_cluster(config: TandemConfig) -> Iterator[RunningCluster]:
    """Serve with `config`, on free ports, for the duration of the block. Raises `ClusterError`."""
    config = _with_free_ports(config)
    started = time.monotonic()
    with TemporaryDirectory(prefix="tandem-bench-") as directory:
        file, log = Path(directory) / "config.yaml", Path(directory) / "serve.log"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tandem", "serve", "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=serve_environment(),
                start_new_session=True,
            )
        try:
            workers = _wait_until_ready(config, process, log)
            yield RunningCluster(
                pid=process.pid,
                host=HOST,
                port=config.gateway.port,
                controller_address=_controller_address(config),
                metrics_addresses=tuple(worker.metrics_address for worker in workers),
                worker_niceness=max(psutil.Process(worker.pid).nice() for worker in workers),
                start_seconds=time.monotonic() - started,
            )
        finally:
            stop_cluster(process)


def _with_free_ports(config: TandemConfig) -> TandemConfig:
    ports = free_ports(3)
    gateway = config.gateway.model_copy(
        update={"host": HOST, "port": ports[0], "grpc_port": ports[1]}
    )
    controller = config.controller.model_copy(
        update={"host": HOST, "port": ports[2], "dashboard": False}
    )
    return config.model_copy(update={"gateway": gateway, "controller": controller})


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((HOST, 0))
        return [int(probe.getsockname()[1]) for probe in sockets]


def serve_environment() -> dict[str, str]:
    """Ours, without what would change the configuration or join another Ray cluster."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TANDEM_") and name != "RAY_ADDRESS"
    }


def _controller_address(config: TandemConfig) -> str:
    return f"{HOST}:{config.controller.port}"


def _wait_until_ready(
    config: TandemConfig, process: subprocess.Popen[bytes], log: Path
) -> list[cluster_pb2.WorkerStatus]:
    """Wait until the gateway and every worker are ready; returns the workers."""
    deadline = time.monotonic() + READY_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"tandem serve ended with {process.returncode}:\n{_tail(log)}")
        workers = _workers(config)
        states = [worker.state for worker in workers]
        ready = states and all(state == cluster_pb2.WORKER_STATE_READY for state in states)
        if ready and _gateway_ready(config.gateway.port):
            return workers
        time.sleep(POLL_INTERVAL)
    raise ClusterError(f"tandem serve was not ready in {READY_TIMEOUT:.0f} s:\n{_tail(log)}")


def _gateway_ready(port: int) -> bool:
    try:
        with urlopen(f"http://{HOST}:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # refused, or an answer other than 200
        return False


def _workers(config: TandemConfig) -> list[cluster_pb2.WorkerStatus]:
    try:
        return list(cluster_status(_controller_address(config)).workers)
    except grpc.RpcError:
        return []  # not yet


def stop_cluster(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Interrupt the cluster and wait; kill what is left of it after `STOP_TIMEOUT`."""
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _tail(log: Path) -> str:
    return log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
