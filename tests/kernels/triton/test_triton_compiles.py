"""The kernels compile for a GPU that is not here: what the interpreter lets pass, this does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_KERNELS = {
    "_rms_norm_kernel",
    "_silu_mul_kernel",
    "_rotary_kernel",
    "_move_kernel",
    "_decode_kernel",
    "_combine_kernel",
    "_chunk_kernel",
    "_noise_kernel",
    "_threshold_kernel",
    "_mask_kernel",
    "_draw_kernel",
    "_choose_kernel",
}


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    cases = [["bfloat16", 32, 8, 128], ["float16", 14, 2, 64], ["float32", 4, 2, 20]]
    program = Path(__file__).parent / "compile_for_hopper.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(cases)],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])["kernels"]
    assert {kernel["name"] for kernel in kernels} == _KERNELS
    attention = [k for k in kernels if k["name"] in ("_decode_kernel", "_chunk_kernel")]
    assert sum(kernel["matrix"] for kernel in attention) > len(attention) // 2
