"""`tandem serve` as an operator meets it: real Ray, real workers, real signals.

The tests share one cluster and run in order; each leaves it whole.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from serve_process import ServeProcess

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

MODEL = "tandem-demo"
QUESTIONS = [f"Count from {start} to 60." for start in range(1, 13)]
SETTINGS = (
    "controller.worker_timeout=1.5",
    "controller.replace_after=60",
    "worker.peer_timeout=1.5",
)


class Serve(ServeProcess):
    """What an operator asks a running `tandem serve`, and what its clients do."""

    def tandem(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tandem", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def workers(self) -> dict[str, dict[str, Any]]:
        done = self.tandem("status", "--json", "--controller", f"127.0.0.1:{self.controller}")
        assert done.returncode == 0, done.stderr
        return {worker["name"]: worker for worker in json.loads(done.stdout)["workers"]}

    def until(self, condition: Callable[[dict[str, dict[str, Any]]], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            workers = self.workers()
            if condition(workers):
                return
        raise AssertionError(f"{what}: {workers}")

    def ask(self, question: str) -> str:
        client = OpenAI(base_url=f"http://127.0.0.1:{self.http}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model=MODEL,
            stream=True,
            temperature=0,
            max_tokens=160,
            messages=[{"role": "user", "content": "Please do what follows. " * 12 + question}],
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    def ask_all(self, pool: ThreadPoolExecutor) -> Callable[[], list[str]]:
        futures = [pool.submit(self.ask, question) for question in QUESTIONS]
        return lambda: [future.result(120) for future in futures]


def all_ready(workers: dict[str, dict[str, Any]]) -> bool:
    return all(worker["state"] == "ready" for worker in workers.values())


def all_free(workers: dict[str, dict[str, Any]]) -> bool:
    return all_ready(workers) and not any(
        worker["blocks_used"] + worker["running"] + worker["waiting"] for worker in workers.values()
    )


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    settings = [argument for setting in SETTINGS for argument in ("--set", setting)]
    log = tmp_path_factory.mktemp("serve") / "log"
    running = Serve(log, "--decode-workers", "2", *settings)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(len(QUESTIONS)) as executor:
        yield executor


@pytest.fixture(scope="module")
def expected(serve: Serve, pool: ThreadPoolExecutor) -> list[str]:
    """The answers of an undisturbed cluster."""
    return serve.ask_all(pool)()


def test_a_trace_of_the_live_cluster_has_its_gateway_and_its_workers(
    serve: Serve, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    page, events = tmp_path / "page.html", tmp_path / "events.jsonl"
    controller = f"127.0.0.1:{serve.controller}"
    files = ("--timeline", str(page), "--json", str(events))
    traced = pool.submit(serve.tandem, "trace", "--controller", controller, "--last", "2s", *files)
    number = 0
    while not traced.done():
        serve.ask(f"Count from {(number := number + 1)} to 60.")
    done = traced.result()
    assert done.returncode == 0, done.stderr
    assert "submitted -> first prefill iteration" in done.stdout
    assert "prefill-0" in page.read_text()
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert {"received", "submitted", "arrived", "finished"} <= {line.get("name") for line in lines}
    assert any(line["event"] == "iteration" for line in lines)


def test_the_printed_examples_work_when_pasted(serve: Serve) -> None:
    printed = serve.printed.partition("\nAsk\n")[2]
    examples = [text for text in printed.split("\n\n") if text.strip()]
    names = {"Ask and stream", "With the openai package", "gRPC, through reflection"}
    commands = {"Ask": examples[0]} | {
        text.partition("\n")[0]: text.partition("\n")[2] for text in examples[1:]
    }
    assert names <= commands.keys()
    for name in ("Ask", *names):
        done = subprocess.run(
            ["bash", "-c", commands[name]], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (name, done.stderr)
        assert done.stdout.strip(), name


def test_status_says_who_is_there(serve: Serve) -> None:
    workers = serve.workers()
    assert {name: worker["role"] for name, worker in workers.items()} == {
        "prefill-0": "prefill",
        "decode-0": "decode",
        "decode-1": "decode",
    }
    for worker in workers.values():
        assert worker["state"] == "ready"
        assert psutil.pid_exists(worker["pid"])
        assert worker["blocks_total"] > 0
        assert worker["incarnation"] > 0


def test_a_second_serve_on_the_same_port_says_so(serve: Serve) -> None:
    done = serve.tandem("serve", "--port", str(serve.http), "--grpc-port", "0")
    assert done.returncode in (1, 2)
    assert f"{serve.http}" in done.stderr + done.stdout
    assert "--port" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_killed_worker_is_replaced_and_no_stream_notices(
    victim: str, serve: Serve, pool: ThreadPoolExecutor, expected: list[str]
) -> None:
    before = serve.workers()[victim]
    answers = serve.ask_all(pool)
    os.kill(before["pid"], signal.SIGKILL)
    assert answers() == expected
    serve.until(
        lambda workers: all_free(workers) and workers[victim]["pid"] != before["pid"], "replaced"
    )
    assert serve.workers()[victim]["restarts"] == before["restarts"] + 1


@pytest.mark.parametrize("victim", ["decode-1", "prefill-0"])
def test_a_frozen_worker_leaves_and_comes_back_as_another_incarnation(
    victim: str, serve: Serve, pool: ThreadPoolExecutor, expected: list[str]
) -> None:
    before = serve.workers()[victim]
    answers = serve.ask_all(pool)
    os.kill(before["pid"], signal.SIGSTOP)
    try:
        assert answers() == expected
        serve.until(lambda workers: workers[victim]["state"] == "unresponsive", "noticed")
    finally:
        os.kill(before["pid"], signal.SIGCONT)
    serve.until(all_free, "woken")
    after = serve.workers()[victim]
    assert after["pid"] == before["pid"]
    assert after["incarnation"] > before["incarnation"]
    assert serve.ask_all(pool)() == expected


def test_a_dead_controller_comes_back_and_finds_the_workers(
    serve: Serve, pool: ThreadPoolExecutor, expected: list[str]
) -> None:
    before = serve.workers()
    controller = next(
        process
        for process in serve.descendants()
        if "ControllerActor" in " ".join(process.cmdline())
    )
    controller.kill()
    assert serve.ask_all(pool)() == expected, "serving goes on without a controller"
    deadline = time.monotonic() + 60
    address = f"127.0.0.1:{serve.controller}"
    while serve.tandem("status", "--json", "--controller", address).returncode:
        assert time.monotonic() < deadline, "the controller did not come back"
    serve.until(all_ready, "rediscovered")
    after = serve.workers()
    assert {n: w["pid"] for n, w in after.items()} == {n: w["pid"] for n, w in before.items()}
    assert {n: w["incarnation"] for n, w in after.items()} == {
        n: w["incarnation"] for n, w in before.items()
    }


def test_metrics_are_where_prometheus_looks_for_them(serve: Serve) -> None:
    base = f"http://127.0.0.1:{serve.http}"
    assert "tandem_gateway_requests_total" in httpx.get(f"{base}/metrics").text
    targets = httpx.get(f"{base}/metrics/targets").json()
    assert len(targets) == 3
    for target in targets:
        text = httpx.get(f"http://{target['targets'][0]}/metrics").text
        assert "tandem_worker_kv_blocks" in text


def test_ctrl_c_leaves_nothing_behind(serve: Serve) -> None:
    shared_memory = set(os.listdir("/dev/shm"))
    serve.family = serve.descendants()
    serve.interrupt()
    assert serve.process.wait(60) == 0
    assert serve.printed.rstrip().endswith("stopped")
    serve.assert_nothing_is_left()
    assert set(os.listdir("/dev/shm")) <= shared_memory
