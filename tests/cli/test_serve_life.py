"""`tandem serve` from start to end, with a real model: it works as printed, and leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import tiny_models

from .conftest import Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

END_SECONDS = 30.0


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Serve:
    """A running `tandem serve`, in a process group of its own as a shell would start it."""

    def __init__(self, model: Path) -> None:
        self.ports = free_ports(3)
        http, grpc, controller = map(str, self.ports)
        command = [sys.executable, "-m", "tandem", "serve", "--model", str(model)]
        command += ["--port", http, "--grpc-port", grpc, "--controller-port", controller]
        command += ["--no-dashboard", "--cpus-per-worker", "0.1"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self.lines: list[str] = []
        self.family: list[psutil.Process] = []

    def read_until(self, text: str) -> None:
        """Read what it prints up to a line with `text`, or to the end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if text and text in line:
                self.family = psutil.Process(self.process.pid).children(recursive=True)
                return
        assert not text, self.lines

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends it to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def assert_nothing_is_left(self) -> None:
        assert len(self.family) > 5
        assert psutil.wait_procs(self.family, timeout=END_SECONDS)[1] == []
        for port in self.ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def serve(model: Path) -> Iterator[Serve]:
    served = Serve(model)
    yield served
    if served.process.poll() is None:
        served.process.kill()
    served.process.wait()


def test_it_serves_as_printed_and_ctrl_c_leaves_nothing(serve: Serve, run_tandem: Run) -> None:
    serve.read_until("Stop with ctrl-C")
    http, grpc, controller = serve.ports

    body = {"model": serve_name(serve), "max_tokens": 4, "prompt": "Tandem"}
    answer = httpx.post(f"http://127.0.0.1:{http}/v1/completions", json=body, timeout=30.0)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] >= 1

    request = '{"text": "Tandem is", "sampling": {"maxTokens": 4, "ignoreEos": true}}'
    address = f"127.0.0.1:{grpc}"
    call = run_tandem("call", "tandem.v1.Inference/Generate", request, "--address", address)
    assert call.returncode == 0, call.stderr
    assert '"completionTokens": 4' in call.stdout.splitlines()[-1]

    listed = run_tandem("call", "--address", address)
    assert "tandem.v1.Inference/Generate  GenerateRequest -> stream of GenerateResponse" in (
        listed.stdout
    )
    refused = run_tandem("call", "tandem.v1.Inference/Nonesuch", "{}", "--address", address)
    assert "has no method 'Nonesuch'; it has Generate" in refused.stderr

    status = run_tandem("status", "--controller", f"127.0.0.1:{controller}")
    assert status.returncode == 0
    assert "prefill-0" in status.stdout

    serve.interrupt()
    serve.read_until("")
    assert serve.process.wait(timeout=END_SECONDS) == 0
    assert serve.lines[-1] == "stopped"
    serve.assert_nothing_is_left()


def test_killing_serve_outright_leaves_nothing_either(serve: Serve) -> None:
    serve.read_until("Stop with ctrl-C")
    serve.process.kill()
    serve.assert_nothing_is_left()


def test_a_model_of_an_unknown_architecture_is_refused_by_name(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        if file.name == "config.json":
            content = content.replace(b"LlamaForCausalLM", b"NonesuchForCausalLM")
        (broken / file.name).write_bytes(content)
    served = Serve(broken)
    served.read_until("")
    assert served.process.wait(timeout=END_SECONDS) == 1
    assert served.lines[-1].startswith("error: ")
    assert "NonesuchForCausalLM" in served.lines[-1]
    assert not any("Traceback" in line for line in served.lines)


def serve_name(serve: Serve) -> str:
    models = httpx.get(f"http://127.0.0.1:{serve.ports[0]}/v1/models").json()
    return str(models["data"][0]["id"])
