"""`tandem serve` on a model of one's own: refused or served, called, killed outright."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_models
from serve_process import ServeProcess

from .conftest import Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def serve(tmp_path: Path, model: Path) -> Iterator[ServeProcess]:
    served = ServeProcess(tmp_path / "log", "--model", str(model), "--no-dashboard")
    yield served
    served.end()


def test_call_speaks_grpc_through_reflection_and_a_kill_leaves_nothing(
    serve: ServeProcess, run_tandem: Run
) -> None:
    serve.wait_until_ready()
    request = '{"text": "Tandem is", "sampling": {"maxTokens": 4, "ignoreEos": true}}'
    address = f"127.0.0.1:{serve.grpc}"
    call = run_tandem("call", "tandem.v1.Inference/Generate", request, "--address", address)
    assert call.returncode == 0, call.stderr
    assert '"completionTokens": 4' in call.stdout.splitlines()[-1]
    listed = run_tandem("call", "--address", address)
    assert "tandem.v1.Inference/Generate  GenerateRequest -> stream of GenerateResponse" in (
        listed.stdout
    )
    refused = run_tandem("call", "tandem.v1.Inference/Nonesuch", "{}", "--address", address)
    assert "has no method 'Nonesuch'; it has Generate" in refused.stderr
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
    served = ServeProcess(tmp_path / "log", "--model", str(broken), "--no-dashboard")
    assert served.process.wait(timeout=60) == 1
    last = served.printed.splitlines()[-1]
    assert last.startswith("error: ")
    assert "NonesuchForCausalLM" in last
    assert "Traceback" not in served.printed
