"""What the machine lets this process run on, as far as cores can be owned."""

from __future__ import annotations

import os
from pathlib import Path

from tandem.core.cores import parse_cores

_CGROUPS = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def ownable_cores() -> tuple[int, ...]:
    """Return the cores of this process's mask, hardware threads of one core side by side.

    None where a quota of time (a container's CPU limit) is all that is given: those cores belong
    to others as well, and which of them are idle only the kernel knows.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    allowed = os.sched_getaffinity(0)
    quota = _quota()
    if quota is not None and quota < len(allowed):
        return ()
    return tuple(sorted(allowed, key=lambda core: (_first_sibling(core), core)))


def _quota() -> float | None:
    """The CPUs that the tightest cgroup (v2) above this process may use; None: no bound."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
    except OSError:
        return None
    places = [_CGROUPS / group.lstrip("/"), _CGROUPS]
    bounds = [_bound(place / "cpu.max") for place in (*places, *places[0].parents)]
    return min((bound for bound in bounds if bound is not None), default=None)


def _bound(file: Path) -> float | None:
    try:
        amount, period = file.read_text().split()
    except (OSError, ValueError):
        return None
    return None if amount == "max" else int(amount) / int(period)


def _first_sibling(core: int) -> int:
    try:
        siblings = (_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        return min(parse_cores(siblings.strip()))
    except (OSError, ValueError):
        return core
