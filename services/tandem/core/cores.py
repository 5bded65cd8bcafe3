"""Which cores a worker owns: sets of core numbers, as text and as shares of a machine.

Pure: what the machine has comes from the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_cores(text: str) -> tuple[int, ...]:
    """Read a list as Linux writes it, "0,2-3". Raises `ValueError` for anything else."""
    cores: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} is not a core or a range of cores")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise ValueError(f"{part.strip()!r} is an empty range of cores")
        cores.extend(range(first, last + 1))
    if len(set(cores)) < len(cores):
        raise ValueError(f"{text!r} names a core twice")
    return tuple(cores)


def format_cores(cores: Iterable[int]) -> str:
    """Write cores in the order of their numbers, as Linux does: "0,2-3"."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def assign_cores(
    allowed: Sequence[int], workers: Sequence[str], threads: int
) -> Mapping[str, tuple[int, ...]]:
    """Give each worker cores of its own, neighbours in `allowed`; nobody any if that cannot be.

    One core at least stays free: whatever else runs would take turns with a thread that cannot
    leave its core.
    `threads`: cores per worker; 0: an even share. The same arguments always give the same sets, so
    a worker that is replaced gets the set that it had.
    """
    each = threads or len(allowed) // max(1, len(workers))
    if each == 0 or each * len(workers) >= len(allowed):
        return {}
    return {name: tuple(allowed[i * each : (i + 1) * each]) for i, name in enumerate(workers)}
