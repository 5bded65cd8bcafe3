"""What a profile was measured on. Says nothing that names the machine: no host, user or path."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

_PACKAGES = ("tandem-serve", "torch", "ray", "grpcio", "numpy")


def describe_machine() -> dict[str, str]:
    """Return processor, cores, memory and, where there are any, GPUs."""
    machine = {
        "cpu": cpu_name(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
    }
    if torch.cuda.is_available():
        machine["gpus"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return machine


def describe_versions() -> dict[str, str]:
    """Return the versions of Tandem, Python and what Tandem stands on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def cpu_name() -> str:
    """The processor's name, as it gives it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
