"""A cluster whose workers are stand-ins: everything but the model is real."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from free_ports import free_port
from tandem.commands.reaper import remove_directory
from tandem.controller.environment import prepare_environment
from tandem.core.config import ControllerConfig, ModelConfig, TandemConfig
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

STAND_IN = "stand_in_worker:StandInWorker"


@dataclass(frozen=True)
class RunningController:
    address: str
    stub: cluster_pb2_grpc.ClusterStub

    def watch(
        self, until: Callable[[cluster_pb2.Membership], bool], timeout: float = 30.0
    ) -> cluster_pb2.Membership:
        """Follow the membership until it is as wanted."""
        call = self.stub.Watch(cluster_pb2.WatchRequest(gateway_id="test"), timeout=timeout)
        for membership in call:
            if until(membership):
                call.cancel()
                return membership
        raise AssertionError("the watch ended")

    def worker(self, name: str) -> cluster_pb2.WorkerStatus:
        status = self.stub.Status(cluster_pb2.StatusRequest(), timeout=20.0, wait_for_ready=True)
        return next(worker for worker in status.workers if worker.name == name)


def cluster_config(served_name: str = "stand-in") -> TandemConfig:
    return TandemConfig(
        model=ModelConfig(served_name=served_name),
        controller=ControllerConfig(
            port=free_port(),
            prefill_workers=1,
            decode_workers=2,
            cpus_per_worker=0.1,
            heartbeat_interval=0.1,
            worker_timeout=1.0,
            replace_after=60.0,
            dashboard=False,
        ),
    )


@pytest.fixture(scope="module")
def local_ray() -> Iterator[object]:
    """One Ray cluster for the module; leaves no process behind."""
    prepare_environment()
    from tandem.controller import session

    before = os.environ.get("PYTHONPATH")
    paths = [str(Path(__file__).parent), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    cluster = session.start_local_ray(cluster_config())
    family = psutil.Process().children(recursive=True)
    try:
        yield cluster
    finally:
        session.disconnect()
        psutil.wait_procs(family, timeout=10)
        if cluster.session_dir is not None:
            remove_directory(cluster.session_dir)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def controller(local_ray: object) -> Iterator[RunningController]:
    from tandem.controller import session

    assert isinstance(local_ray, session.RayCluster)
    classes = {"prefill": STAND_IN, "decode": STAND_IN}
    handle = session.start_controller(cluster_config(), local_ray, classes)
    address = handle.address()
    with grpc.insecure_channel(address) as channel:
        yield RunningController(address, cluster_pb2_grpc.ClusterStub(channel))
    handle.stop()
