"""The checked-in protobuf code is what `make proto` generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROTOS = sorted((ROOT / "proto/tandem/v1").glob("*.proto"))


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    bin_dir = Path(sys.executable).parent
    plugins = [
        f"--plugin=protoc-gen-{name}={bin_dir / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    outputs = ["python_out=", "grpc_python_out=", "mypy_out=quiet:", "mypy_grpc_out=quiet:"]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *plugins]
    command += [f"--{output}{tmp_path}" for output in outputs]
    subprocess.run([*command, *map(str, PROTOS)], check=True)
    generated = sorted((tmp_path / "tandem/v1").iterdir())
    assert generated
    for fresh in generated:
        checked_in = ROOT / "services/tandem/v1" / fresh.name
        assert checked_in.read_text() == fresh.read_text(), (
            f"{fresh.name} is stale: run `make proto`"
        )
