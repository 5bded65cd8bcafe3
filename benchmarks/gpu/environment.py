"""What the machine is, and its two ceilings as measured: copying memory, multiplying matrices."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.harness import Machine, Result, seconds

_PACKAGES = ("torch", "triton", "numpy", "transformers", "grpcio", "pydantic", "ray", "flashinfer")


def run(machine: Machine, result: Result) -> None:
    result.values["versions"] = {name: _version(name) for name in _PACKAGES}
    result.notes.append(f"Python {platform.python_version()}, {os.cpu_count()} CPUs")
    versions = result.values["versions"].items()
    result.notes.append(", ".join(f"{name} {number}" for name, number in versions if number))
    if not machine.cuda:
        result.notes.append("no CUDA device: Triton's interpreter, tiny shapes, times mean nothing")
        size, side = 2**20, 64
    else:
        properties = torch.cuda.get_device_properties(machine.device)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        result.values |= {"gpu": properties.name, "cuda": torch.version.cuda, "nccl": nccl}
        result.notes.append(
            f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, NCCL {nccl}"
        )
        size, side = 2**32, 8192
    source = torch.randn(size // 4, device=machine.device)
    target = torch.empty_like(source)
    copy = seconds(machine, lambda: target.copy_(source), 100)
    left, right = torch.randn(2, side, side, device=machine.device).to(torch.bfloat16)
    product = seconds(machine, lambda: left @ right, 100)
    result.rows = [
        {"ceiling": "device copy, TB/s read + written", "measured": 2 * size / copy / 1e12},
        {
            "ceiling": f"bf16 matmul of {side} x {side}, random data, TFLOP/s",
            "measured": 2 * side**3 / product / 1e12,
        },
    ]
    if machine.cuda:
        result.values |= {"copy_rate": 2 * size / copy, "matmul_rate": 2 * side**3 / product}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
