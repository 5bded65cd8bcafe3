"""A controller that answers from a script, and the command line as a person runs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest

from free_ports import free_port
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_tandem() -> Run:
    """Run `tandem ...` to its end, without the settings of whoever runs the tests."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if "TANDEM_" not in name}
        clean["COLUMNS"] = "100"
        return subprocess.run(
            [sys.executable, "-m", "tandem", *arguments],
            capture_output=True,
            text=True,
            env={**clean, **environment},
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def closed_port() -> int:
    return free_port()


class ScriptedCluster(cluster_pb2_grpc.ClusterServicer):
    def __init__(self, status: cluster_pb2.ClusterStatus) -> None:
        self._status = status

    def Status(  # noqa: N802
        self, request: cluster_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> cluster_pb2.ClusterStatus:
        return self._status


@pytest.fixture
def scripted_controller() -> Iterator[str]:
    """Two workers: one at work, one that died twice. Yields the address."""
    status = cluster_pb2.ClusterStatus(
        membership_version=7,
        model="tiny",
        dashboard="http://127.0.0.1:8265",
        workers=[
            cluster_pb2.WorkerStatus(
                name="prefill-0",
                role=cluster_pb2.ROLE_PREFILL,
                state=cluster_pb2.WORKER_STATE_READY,
                pid=4242,
                node="10.0.0.7",
                device="cpu",
                incarnation=17,
                running=3,
                waiting=2,
                blocks_used=10,
                blocks_cached=20,
                blocks_total=64,
                links=1,
                tokens_per_second=123.4,
            ),
            cluster_pb2.WorkerStatus(
                name="decode-0",
                role=cluster_pb2.ROLE_DECODE,
                state=cluster_pb2.WORKER_STATE_DEAD,
                restarts=2,
                detail="its process ended (system error)",
            ),
        ],
    )
    server = grpc.server(futures.ThreadPoolExecutor(2))
    cluster_pb2_grpc.add_ClusterServicer_to_server(ScriptedCluster(status), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()
