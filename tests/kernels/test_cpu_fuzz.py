"""Random calls of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The library is built once more with the sanitizers in it and called from a program of its own, into
which the sanitizer's runtime is preloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kernels.cpu_cases import CASES

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "kernels" / "tandem_kernels" / "cpu" / "native"
NUM_CASES = int(os.environ.get("TANDEM_FUZZ_CASES", "60"))
FIRST_SEED = int(os.environ.get("TANDEM_FUZZ_SEED", "1000"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    command = [
        *(compiler, "-std=c++17", "-O1", "-g", "-ffp-contract=fast", "-fPIC", "-shared"),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        *("-Wno-psabi", "-Wno-uninitialized", "-pthread", "-o", str(library)),
        *(str(path) for path in sorted(NATIVE.glob("*.cpp"))),
    ]
    subprocess.run(command, check=True, timeout=600)
    return library


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_random_calls_are_clean_under_sanitizers(sanitized: Path) -> None:
    runtimes = [
        subprocess.run(
            [os.environ.get("CXX", "g++"), f"-print-file-name={name}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "services"), str(ROOT / "kernels")]),
    }
    script = Path(__file__).parent / "cpu_cases.py"
    result = subprocess.run(
        [sys.executable, str(script), str(sanitized), str(NUM_CASES), str(FIRST_SEED)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-300:] + result.stderr[-6000:]
    assert result.stdout.count("seed") >= len(CASES) * NUM_CASES
