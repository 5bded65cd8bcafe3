"""What a run was measured on, and who else used the machine meanwhile.

Says nothing that names the machine: no host, no user, no path.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tandem.profiler.machine import cpu_name, describe_versions


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory, versions, date and the load before anything was started."""
    versions = describe_versions()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "kernel": platform.release().split("-")[0],
        "python": versions.pop("python"),
        "versions": versions,
        "revision": _revision(),
    }


@dataclass(frozen=True)
class CpuUse:
    """Seconds of CPU since the machine started: of everybody, and of one tree of processes."""

    everybody: float
    stolen: float
    """Taken by the hypervisor for others."""
    tree: dict[int, float]

    @classmethod
    def now(cls, root: int) -> CpuUse:
        """Read the counters; `root` is the process at the top of the tree."""
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.irq + times.softirq
        processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        return cls(busy, getattr(times, "steal", 0.0), _cpu_seconds(processes))

    def tree_since(self, before: CpuUse) -> float:
        """CPU seconds that the tree used."""
        return sum(seconds - before.tree.get(pid, 0.0) for pid, seconds in self.tree.items())

    def foreign_since(self, before: CpuUse, ours: float) -> float:
        """CPU seconds that neither the tree nor we (`ours` seconds) used, and those stolen."""
        used = self.everybody - before.everybody - self.tree_since(before) - ours
        return max(0.0, used) + self.stolen - before.stolen


def _cpu_seconds(processes: Iterable[psutil.Process]) -> dict[int, float]:
    seconds = {}
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds[process.pid] = times.user + times.system
    return seconds


def _revision() -> str:
    """The commit that is measured, marked when files differ from it; "" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
