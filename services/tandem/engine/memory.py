"""What memory this machine has left: asked of the kernel, within what a container may use.

Reads files under /proc and /sys; decides nothing.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that programs may still take without swapping: what the kernel calls
    available, or what is left to this process's control groups, whichever is less."""
    return min([_mem_available(root), *_left_in_groups(root)])


def give_back_freed_memory() -> None:
    """Have the allocator return what was freed to the kernel, where it can (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def readable(nbytes: int) -> str:
    """A number of bytes for people."""
    size, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"


def _mem_available(root: Path) -> int:
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Not Linux: half of what is installed is a guess that leaves room for everything else.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_in_groups(root: Path) -> list[int]:
    """What each control group with a limit, from this process's own up to the root, has left."""
    left = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":  # version 2
                names = ("memory.max", "memory.current", "inactive_file")
                left += _left_up_to(root / "sys/fs/cgroup", path, *names)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                left += _left_up_to(root / "sys/fs/cgroup/memory", path, *names)
    return left


def _left_up_to(top: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    group = top / path.strip("/")
    left = []
    while True:
        with suppress(OSError, ValueError):  # no limit reads "max"; the root has no such files
            used = int((group / usage).read_text()) - _stat(group, reclaimable)
            left.append(max(0, int((group / limit).read_text()) - used))
        if group in (top, group.parent):
            return left
        group = group.parent


def _stat(group: Path, name: str) -> int:
    for line in (group / "memory.stat").read_text().splitlines():
        key, value = line.split()
        if key == name:
            return int(value)
    return 0
