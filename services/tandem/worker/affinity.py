"""A worker's hold on its cores: claimed from other workers of the machine, and set as masks.

The thread that runs the model and those that help it are pinned, one to a core. A pinned thread
waits whenever its neighbour is on its core, so cores are used only while no other worker has
claimed them. Everything else in the process stays on the set if it has more than one core; on a
single core it would take turns with the model, so it may go elsewhere.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import structlog

from tandem.core.cores import format_cores, parse_cores

log = structlog.get_logger(__name__)


class CoreClaim:
    """The cores that this process owns until it ends; none if it runs unpinned."""

    def __init__(self, setting: str) -> None:
        """`setting`: worker.cpu_affinity as the launcher resolved it, a list of cores or "off".
        Whoever starts a worker without a launcher leaves "auto", which claims none."""
        self.cores: tuple[int, ...] = ()
        self._held: list[socket.socket] = []
        wanted = () if setting in ("auto", "off") else parse_cores(setting)
        if not wanted:
            return
        reason = self._obstacle(wanted)
        if reason:
            self.release()
            log.warning("cores are not pinned", cores=format_cores(wanted), reason=reason)
            return
        self.cores = wanted
        if len(wanted) > 1:
            _move_process(wanted)
        log.info("cores are pinned", cores=format_cores(wanted))

    def describe(self, device: str) -> str:
        """The device with the cores that are owned, for people."""
        if not self.cores:
            return device
        return f"{device}, core{'s' * (len(self.cores) > 1)} {format_cores(self.cores)}"

    def release(self) -> None:
        """Let other workers have the cores. Masks stay as they are."""
        for held in self._held:
            held.close()
        self._held.clear()

    def _obstacle(self, wanted: Sequence[int]) -> str:
        """Claim the cores; say what stands in the way, if anything does."""
        foreign = set(wanted) - os.sched_getaffinity(0)
        if foreign:
            return f"core {format_cores(foreign)} is not in this process's mask"
        for core in wanted:
            # An abstract name: the kernel frees it when the process ends, however it ends.
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                claim.bind(f"\0tandem-core-{core}")
            except OSError:
                claim.close()
                return f"core {core} belongs to another worker of this machine"
            self._held.append(claim)
        return ""


def pin_thread(core: int | None) -> None:
    """Keep the calling thread on one core; None leaves it where it is."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def _move_process(cores: Sequence[int]) -> None:
    """Keep every thread of this process, and those that they make, on the cores."""
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:  # ended meanwhile
            continue
