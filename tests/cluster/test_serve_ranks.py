"""Workers of several ranks under Ray: a lost rank is replaced with its whole worker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_process import ServeProcess

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

FLAGS = ("--prefill-tensor-parallel", "2", "--decode-tensor-parallel", "2", "--no-dashboard")
SETTINGS = ("--set", "worker.peer_timeout=1.5", "--set", "worker.local_prefill_max_tokens=2")


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[ServeProcess]:
    log = tmp_path_factory.mktemp("serve") / "log"
    served = ServeProcess(log, "--model", str(tiny_llama), *FLAGS, *SETTINGS)
    try:
        served.wait_until_ready()
        yield served
    finally:
        served.end()


def status(serve: ServeProcess, *arguments: str) -> str:
    command = [sys.executable, "-m", "tandem", "status", *arguments]
    command += ["--controller", f"127.0.0.1:{serve.controller}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def workers(serve: ServeProcess) -> dict[str, dict[str, Any]]:
    listed = json.loads(status(serve, "--json"))["workers"]
    return {worker["name"]: worker for worker in listed}


def complete(serve: ServeProcess) -> str:
    body = {"model": "llama", "prompt": "Tandem is " * 6, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"http://127.0.0.1:{serve.http}/v1/completions", json=body, timeout=90)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def further_ranks(serve: ServeProcess) -> list[psutil.Process]:
    family = psutil.Process(serve.process.pid).children(recursive=True)
    return [process for process in family if "RankActor" in " ".join(process.cmdline())]


def test_status_shows_the_degree(serve: ServeProcess) -> None:
    assert {worker["tensor_parallel"] for worker in workers(serve).values()} == {2}
    assert status(serve).count("cpu tp 2") == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_rank_is_replaced_with_its_worker(
    serve: ServeProcess, number: signal.Signals
) -> None:
    expected = complete(serve)
    before = workers(serve)
    ranks = further_ranks(serve)
    assert len(ranks) == 2
    for rank in ranks:
        rank.send_signal(number)
    assert complete(serve) == expected
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = workers(serve)
        replaced = [
            now[name]["restarts"] > before[name]["restarts"] and now[name]["state"] == "ready"
            for name in before
        ]
        if all(replaced):
            break
    assert all(replaced), now
    assert complete(serve) == expected
    assert psutil.wait_procs(ranks, timeout=20)[1] == []
    assert len(further_ranks(serve)) == 2


def test_nothing_is_left(serve: ServeProcess) -> None:
    """Runs last: ends the cluster."""
    serve.family = serve.descendants()
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(60) == 0
    serve.assert_nothing_is_left()


def test_a_degree_that_does_not_divide_is_refused_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    flags = ("--decode-tensor-parallel", "3", "--no-dashboard")
    served = ServeProcess(tmp_path / "log", "--model", str(tiny_llama), *flags)
    try:
        assert served.process.wait(timeout=90) == 1
    finally:
        served.end()
    assert served.printed.splitlines()[-1] == (
        "error: decode.tensor_parallel is 3; allowed for this model: 1, 2, 4 "
        "(4 heads do not divide by 3)"
    )
