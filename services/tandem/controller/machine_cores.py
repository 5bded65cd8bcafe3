"""Which cores each worker of this machine gets, out of those that this process may run on."""

from __future__ import annotations

import os
from pathlib import Path

from tandem.core.config import TandemConfig
from tandem.core.cores import assign_cores, format_cores, parse_cores

_CGROUPS = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def with_cores(
    config: TandemConfig, names: tuple[str, ...], name: str, *, several_nodes: bool
) -> TandemConfig:
    """Resolve worker.cpu_affinity "auto" to the worker's own cores, "off" where there are none.

    On several nodes Ray chooses a worker's node later than this, so nobody knows its neighbours.
    Ranks of one worker share its configuration, so where there are several nobody is pinned.
    """
    if config.worker.cpu_affinity != "auto":
        return config
    cores: tuple[int, ...] = ()
    several_ranks = max(config.prefill.tensor_parallel, config.decode.tensor_parallel) > 1
    if not (several_nodes or several_ranks or config.controller.gpus_per_worker):
        cores = assign_cores(ownable_cores(), names, config.worker.threads).get(name, ())
    affinity = format_cores(cores) if cores else "off"
    worker = config.worker.model_copy(update={"cpu_affinity": affinity})
    return config.model_copy(update={"worker": worker})


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
