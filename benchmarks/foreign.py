"""Who else used the machine while something was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.machine import CpuUse

TOLERABLE = 0.1
"""Past this share of the machine, figures say more about others than about what was measured."""


def warning(share: float) -> str:
    """Return what a page says where others took too much of the machine; else nothing."""
    if share <= TOLERABLE:
        return ""
    return f"**Not to be relied on: other programs took up to {share:.0%} of the machine.** "


@dataclass
class ForeignLoad:
    """What others took, of all cores, from the begin to the end of a block."""

    load_average: float
    """Of the last minute, when the block began: partly our own doing."""
    share: float = 0.0

    def as_json(self) -> dict[str, float]:
        """Return it for the results."""
        return {"load_average": round(self.load_average, 2), "foreign": round(self.share, 4)}


@contextmanager
def foreign_load() -> Iterator[ForeignLoad]:
    """Measure the block. Ours are this process, its descendants, and children that ended in it."""
    load = ForeignLoad(os.getloadavg()[0])
    before, ended, start = CpuUse.now(os.getpid()), _ended_children(), time.monotonic()
    yield load
    after = CpuUse.now(os.getpid())
    seconds = (time.monotonic() - start) * (os.cpu_count() or 1)
    foreign = after.foreign_since(before, _ended_children() - ended)
    load.share = min(1.0, foreign / seconds) if seconds else 0.0


def _ended_children() -> float:
    times = os.times()
    return times.children_user + times.children_system
