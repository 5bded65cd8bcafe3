"""Runs simulations side by side, each in a process of its own; results come in order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Map(Protocol):
    """`map`, wherever it runs."""

    def __call__(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]: ...


@contextmanager
def parallel_map(num_processes: int = 0) -> Iterator[Map]:
    """Yield a `map` over so many processes; 0: one per core. With one, nothing is started."""
    count = num_processes or len(os.sched_getaffinity(0))
    if count == 1:
        yield lambda function, jobs: [function(job) for job in jobs]
        return
    # Not `fork`: the command line has loaded libraries that run threads.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(count, mp_context=context) as executor:
        yield lambda function, jobs: list(executor.map(function, jobs))
