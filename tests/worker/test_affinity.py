"""Processes that claim cores run on them, and no two own the same one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tandem.core.cores import format_cores
from tandem.worker.affinity import CoreClaim, pin_thread
from tandem.worker.engine_loop import EngineLoop
from tandem_kernels.cpu import Context
from tandem_kernels.cpu.library import load_library

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the system has no masks of cores"
)

MASKS = """
import os, sys, threading
from pathlib import Path
from tandem.worker.affinity import CoreClaim
started, ended = threading.Event(), threading.Event()
def wait():
    started.set(); ended.wait()
threading.Thread(target=wait).start()
started.wait()
claim = CoreClaim(sys.argv[1])
print(claim.describe("cpu"), flush=True)
tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
print(sorted({core for task in tasks for core in os.sched_getaffinity(task)}), flush=True)
sys.stdin.read()
ended.set()
"""


def start(setting: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MASKS, setting],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def test_every_thread_of_a_process_is_on_the_set_that_it_claimed() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one core: there is no set to stay within")
    wanted = allowed[:2]
    with start(format_cores(wanted)) as process:
        said, masks = first_two(process)
        process.communicate()
    if "core" not in said:
        pytest.skip("the cores belong to a worker of this machine")
    assert said == f"cpu, cores {format_cores(wanted)}"
    assert masks == str(wanted)


def first_two(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it describes and its masks, past the log line between them."""
    assert process.stdout is not None
    told: list[str] = []
    while len(told) < 2:
        line = process.stdout.readline()
        assert line, "the process ended early"
        if line.startswith(("cpu", "[")):
            told.append(line.strip())
    return told[0], told[1]


def test_a_core_that_is_taken_is_not_pinned_to() -> None:
    core = format_cores([max(os.sched_getaffinity(0))])
    first = CoreClaim(core)
    if not first.cores:
        pytest.skip("the core belongs to a worker of this machine")
    second = CoreClaim(core)
    assert second.cores == ()
    assert second.describe("cpu") == "cpu"
    first.release()
    third = CoreClaim(core)
    assert third.describe("cpu") == f"cpu, core {core}"
    third.release()


def test_a_core_outside_of_the_mask_is_not_pinned_to() -> None:
    assert CoreClaim("100000").cores == ()


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_nothing_is_claimed_where_no_cores_are_named(setting: str) -> None:
    assert CoreClaim(setting).cores == ()


@pytest.mark.skipif(load_library() is None, reason="installed without a C++ compiler")
def test_kernel_threads_are_pinned_one_to_a_core() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one core")
    before = tasks()
    context = Context(2)
    (helper,) = tasks() - before
    context.pin(allowed[:2])
    assert os.sched_getaffinity(helper) == {allowed[1]}
    with pytest.raises(ValueError, match="1 cores for 2 threads"):
        context.pin(allowed[:1])


def tasks() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def test_pinning_a_thread_moves_only_that_thread() -> None:
    masks: list[set[int]] = []
    core = max(os.sched_getaffinity(0))

    def run() -> None:
        pin_thread(core)
        masks.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    before = os.sched_getaffinity(0)
    thread.start()
    thread.join()
    assert masks == [{core}]
    assert os.sched_getaffinity(0) == before


def test_the_engine_thread_stays_on_its_core() -> None:
    core = max(os.sched_getaffinity(0))
    masks: list[set[int]] = []
    seen = threading.Event()
    loop = EngineLoop("test", lambda: False, core)
    loop.post(lambda: masks.append(os.sched_getaffinity(0)))
    loop.post(seen.set)
    loop.start()
    assert seen.wait(10)
    loop.stop()
    assert masks == [{core}]
