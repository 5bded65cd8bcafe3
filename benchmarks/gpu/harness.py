"""What the sections share: the machine, results, errors against a reference, times against a bound.

No section lives here, and nothing about models or kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]

FALLBACK_COPY_RATE = 4.3e12
"""Bytes per second read and written, where the ceiling was not measured (an H200's)."""
FALLBACK_MATMUL_RATE = 780e12
"""bf16 floating-point operations per second, likewise."""


class SkippedError(Exception):
    """A section that cannot run here; the message says why."""


@dataclass(frozen=True)
class Machine:
    """What a section runs on."""

    device: torch.device
    small: bool
    """Tiny shapes: on the interpreter, to show that everything runs."""
    copy_rate: float = FALLBACK_COPY_RATE
    matmul_rate: float = FALLBACK_MATMUL_RATE

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


@dataclass
class Result:
    """What a section found. A failed check makes it fail, whatever else it says."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """For later sections and for comparing runs."""

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A failure inside is recorded and does not stop the rest of the section."""
        try:
            yield
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {first_line(error)}")

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.failures.append(what)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖ in float64; infinite if anything is not a number."""
    out, reference = out.detach().cpu().double(), reference.detach().cpu().double()
    if not bool(out.isfinite().all()):
        return float("inf")
    return float((out - reference).norm() / reference.norm().clamp_min(1e-30))


def poison(machine: Machine, nbytes: int) -> None:
    """Leave NaN in memory that the next allocation will probably reuse."""
    torch.full((max(1, nbytes // 4),), float("nan"), device=machine.device)


def seconds(machine: Machine, function: Callable[[], object], milliseconds: int = 40) -> float:
    """Median device time of a call with a cold L2 cache; on the interpreter one wall time."""
    if machine.cuda:
        from triton.testing import do_bench

        return float(do_bench(function, warmup=15, rep=milliseconds, return_mode="median")) * 1e-3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def wall_seconds(machine: Machine, function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call that ends synchronised."""
    times = []
    for _ in range(repeats):
        machine.synchronize()
        started = time.perf_counter()
        function()
        machine.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"
