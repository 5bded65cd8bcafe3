"""The failure table's rows that are the controller's, against real processes under real Ray."""

from __future__ import annotations

import os
import signal

import grpc
import psutil
import pytest
import ray

from tandem.controller import session
from tandem.controller.launcher import CONTROLLER_NAME, NAMESPACE, actor_name
from tandem.core.errors import ConfigError
from tandem.v1 import cluster_pb2

from .conftest import STAND_IN, RunningController, cluster_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def names(membership: cluster_pb2.Membership) -> set[str]:
    return {member.name for member in membership.members}


def incarnation(membership: cluster_pb2.Membership, name: str) -> int:
    return next((m.incarnation for m in membership.members if m.name == name), 0)


ALL = {"prefill-0", "decode-0", "decode-1"}


def everyone(membership: cluster_pb2.Membership) -> bool:
    return names(membership) == ALL


def test_every_worker_becomes_a_member_under_a_readable_name(controller: RunningController) -> None:
    membership = controller.watch(everyone)
    assert membership.disaggregated
    assert membership.model.vocab_size == 512
    worker = controller.worker("decode-1")
    assert worker.state == cluster_pb2.WORKER_STATE_READY
    assert worker.blocks_total == 64
    assert psutil.pid_exists(worker.pid)
    assert ray.get_actor(actor_name("decode-1"), namespace=NAMESPACE) is not None
    assert ray.util.get_placement_group(actor_name("decode-1")) is not None


def test_a_killed_worker_is_replaced(controller: RunningController) -> None:
    before = controller.watch(everyone)
    victim = controller.worker("decode-0")
    os.kill(victim.pid, signal.SIGKILL)
    without = controller.watch(lambda m: incarnation(m, "decode-0") != victim.incarnation)
    after = controller.watch(lambda m: everyone(m) and m.version >= without.version)
    assert after.version > before.version
    assert incarnation(after, "decode-0") > victim.incarnation
    replacement = controller.worker("decode-0")
    assert replacement.pid != victim.pid
    assert replacement.restarts == 1
    assert incarnation(after, "decode-1") == incarnation(before, "decode-1")


def test_a_frozen_worker_leaves_and_returns_with_a_new_incarnation(
    controller: RunningController,
) -> None:
    before = controller.watch(everyone)
    frozen = controller.worker("prefill-0")
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        without = controller.watch(lambda m: "prefill-0" not in names(m))
        assert names(without) == ALL - {"prefill-0"}
        assert controller.worker("prefill-0").state == cluster_pb2.WORKER_STATE_UNRESPONSIVE
        assert "silent" in controller.worker("prefill-0").detail
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    after = controller.watch(everyone)
    assert incarnation(after, "prefill-0") > incarnation(before, "prefill-0")
    woken = controller.worker("prefill-0")
    assert woken.pid == frozen.pid
    assert woken.restarts == frozen.restarts


def test_a_restarted_controller_finds_its_workers_again(controller: RunningController) -> None:
    before = controller.watch(everyone)
    pids = {name: controller.worker(name).pid for name in ALL}
    call = controller.stub.Watch(cluster_pb2.WatchRequest(gateway_id="gateway"))
    next(call)
    actor = ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    ray.kill(actor, no_restart=False)
    with pytest.raises(grpc.RpcError):
        next(call)
    status = controller.stub.Status(cluster_pb2.StatusRequest(), timeout=30.0, wait_for_ready=True)
    assert {worker.name: worker.pid for worker in status.workers} == pids
    after = controller.watch(lambda membership: True)  # the very first answer is complete
    assert names(after) == ALL
    assert after.version > before.version
    for name in ALL:
        assert incarnation(after, name) == incarnation(before, name)


def test_a_second_controller_is_refused(
    controller: RunningController, local_ray: session.RayCluster
) -> None:
    controller.watch(everyone)
    with pytest.raises(ConfigError, match="up already"):
        session.start_controller(cluster_config(), local_ray, {})


def test_down_leaves_no_worker_and_no_place(controller: RunningController) -> None:
    controller.watch(everyone)
    processes = [psutil.Process(controller.worker(name).pid) for name in ALL]
    handle = session.find_controller()
    assert handle is not None
    handle.stop()
    assert psutil.wait_procs(processes, timeout=20)[1] == []
    for name in ALL:
        with pytest.raises(ValueError, match="Failed to look up"):
            ray.util.get_placement_group(actor_name(name))
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)


def test_a_model_that_cannot_load_is_named(local_ray: session.RayCluster) -> None:
    """Runs after `down`: the cluster is free again."""
    classes = {"prefill": STAND_IN, "decode": STAND_IN}
    handle = session.start_controller(cluster_config("broken"), local_ray, classes)
    try:
        handle.address()
        cause = _wait_for_fatal(handle)
        assert cause == "architecture 'Nonesuch' is not supported"
    finally:
        handle.stop()


def _wait_for_fatal(handle: session.ControllerHandle) -> str:
    while not (cause := handle.fatal()):  # each call is a round trip; the test's timeout bounds it
        pass
    return cause
