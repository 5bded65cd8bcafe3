"""Child processes of the benchmark: asked over pipes, frozen, and never left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from benchmarks.client import LoadError
from benchmarks.peers.environments import UnavailableError
from benchmarks.peers.recipes import PROGRAMS
from benchmarks.peers.sessions import Program
from benchmarks.servers import Group, http_server, process_group, wait_until_healthy

STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""
ENGINE = f"""
import sys
sys.path.insert(0, {str(PROGRAMS)!r})
import protocol, time
def generate(prompts, max_tokens):
    print("what a library prints")
    if max_tokens > 9:
        raise RuntimeError("RuntimeError: too many")
    return [[time.perf_counter()] * max_tokens for _ in prompts]
protocol.serve(lambda arguments: ("an engine", generate))
"""


def test_what_a_child_started_is_stopped_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.servers.STOP_TIMEOUT", 0.2)
    with process_group([sys.executable, "-c", STUBBORN], tmp_path / "log") as process:
        assert process.stdout is not None
        grandchild = psutil.Process(int(process.stdout.readline()))

    psutil.wait_procs([grandchild], timeout=10)
    assert not grandchild.is_running()
    assert process.returncode is not None


def test_a_frozen_engine_answers_when_it_is_thawed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process_group([sys.executable, "-c", ENGINE], log) as process:
        engine = Program("engine", process, log)
        assert engine._read() == {"ready": "an engine"}

        engine.freeze()
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            pass
        engine.thaw()
        times = engine.generate([[1, 2], [3]], 3)

        assert [len(request) for request in times] == [3, 3]
        assert all(moment >= 0 for request in times for moment in request)
        with pytest.raises(LoadError, match="too many"):
            engine.generate([[1]], 10)
    assert "what a library prints" in log.read_text()


def test_a_server_that_ends_says_its_last_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "raise OSError('no such model')"]
    with http_server(command, log) as server:
        assert isinstance(server, Group)
        with pytest.raises(UnavailableError, match="no such model"):
            wait_until_healthy(server, 1, log)
