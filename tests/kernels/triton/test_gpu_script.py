"""The GPU script runs to its end without a GPU, on the interpreter, and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks/gpu/run.py"


def run_script(out: Path, *arguments: str) -> tuple[int, dict[str, dict[str, object]]]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=170, check=False)
    return done.returncode, json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_every_section_ends_well(tmp_path: Path) -> None:
    code, results = run_script(tmp_path)
    assert {name: result["status"] for name, result in results.items()} == dict.fromkeys(
        (
            "environment",
            "kernel_correctness",
            "engine_equality",
            "kernel_times",
            "model_speed",
            "kv_streaming",
            "exposed_transfer",
            "cluster",
        ),
        "ok",
    )
    assert code == 0
    report = (tmp_path / "results.md").read_text()
    assert all(f"## {name.replace('_', ' ')}: ok" in report for name in results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_section_that_fails_does_not_stop_the_rest(tmp_path: Path) -> None:
    sections = ["environment", "kernel_correctness"]
    code, results = run_script(tmp_path, "--only", *sections, "--device", "cuda")
    assert [(name, result["status"]) for name, result in results.items()] == [
        ("environment", "failed"),
        ("kernel_correctness", "failed"),
    ]
    assert all(result["failures"] for result in results.values())
    assert code == 1


def test_no_section_starts_when_the_time_is_up(tmp_path: Path) -> None:
    code, results = run_script(tmp_path, "--only", "environment", "--budget", "0")
    assert results["environment"]["status"] == "timeout"
    assert code == 1
