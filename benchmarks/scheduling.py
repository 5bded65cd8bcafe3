"""What decisions cost: scheduling and batch building per iteration, and routing per request.

A program: `python -m benchmarks.scheduling` prints two tables in Markdown. No model runs and no
network is used: the real scheduler, block pool, input builder and router, by themselves. Times are
CPU time of one thread, so that other programs on the machine count little; the interpreter's
garbage collector is off while one is taken.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.machine import describe_machine
from tandem.core.config import RouterConfig, SchedulerConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, Sequence
from tandem.engine.inputs import InputBuilder
from tandem.engine.launched import Launched
from tandem.engine.sampler import Sampler
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.hashing import chain_hashes
from tandem.router import Router
from tandem.scheduler import Scheduler

RUNNING = (1, 32, 256, 1024)
PROMPT, BLOCK = 200, 16
ITERATIONS = 120
WORKERS, PREFIXES, DECISIONS = 1000, 100_000, 2000


class Decoding:
    """A decode worker of `running` sequences without its model, one iteration under way."""

    def __init__(self, running: int) -> None:
        config = SchedulerConfig(
            max_running=running + 1,
            max_batch_tokens=(running + 1) * PROMPT,
            chunk_size=PROMPT,
            max_waiting=4096,
        )
        blocks = (running + 2) * (PROMPT + 4 * ITERATIONS) // BLOCK
        pool = BlockPool(blocks, BLOCK, prefix_cache=False)
        self.scheduler = Scheduler(config, pool, max_model_len=PROMPT + 8 * ITERATIONS)
        self._inputs = InputBuilder(Sampler((0,)), BLOCK, torch.device("cpu"))
        self._under_way: list[tuple[IterationPlan, Launched]] = []
        self._last: Launched | None = None
        self._arrivals = 0
        for _ in range(running):
            self.join()
        for _ in range(4):  # every prompt is computed and everybody decodes
            self.iterate()

    def join(self) -> None:
        """Let a sequence in whose prompt is one token short of decoding."""
        index = self._arrivals
        self._arrivals += 1
        tokens = tuple(range(index % 97, index % 97 + PROMPT))
        sampling = SamplingParams(max_tokens=10**6, temperature=1.0, seed=index)
        self.scheduler.add(Sequence(Request(str(index), tokens, PROMPT, sampling), index))

    def leave(self) -> None:
        """End the sequence that has run longest."""
        self.scheduler.finish(self.scheduler.running.first, "stop")

    def iterate(self) -> float:
        """Plan, build and launch an iteration and settle the one before; seconds without the device
        and without sending tokens."""
        started = time.thread_time()
        plan = self.scheduler.schedule()
        if plan.chunks:
            inputs = self._inputs.build(plan.chunks, self._last)
            self._last = Launched(inputs.drawn)
            self.scheduler.launch(plan)
            self._under_way.append((plan, self._last))
        while len(self._under_way) > 1:
            done, launched = self._under_way.pop(0)
            self.scheduler.advance(done)
            for seq in launched.drawn:
                if seq.phase == "running":
                    self.scheduler.append(seq, 7)
        return time.thread_time() - started


def scheduling_cost(running: int, changing: bool) -> float:
    """Return the median seconds of an iteration; with `changing`, one joins and one leaves in
    each."""
    worker = Decoding(running)
    times = []
    for _ in range(ITERATIONS):
        if changing:
            worker.leave()
            worker.join()
        times.append(_quietly(worker.iterate))
    return median(times)


def routing_cost() -> dict[str, float]:
    """Return seconds per decision (both workers of a request, counted and recorded): p50 and p99.

    Every prompt begins with one of 16 system prompts of 512 tokens, which most workers hold; then
    come 64 tokens of one of the cached conversations and 64 new ones.
    """
    rng = Random(1)
    decode = [f"decode-{index}" for index in range(WORKERS // 2)]
    prefill = [f"prefill-{index}" for index in range(WORKERS // 2)]
    router = Router(RouterConfig(max_tracked_blocks=4096), BLOCK, seed=0)
    router.set_members(prefill, decode)

    def prompt(number: int, new: int = 0) -> list[bytes]:
        tokens = list(range(1000 * (number % 16), 1000 * (number % 16) + 512))
        tokens += [number] * 64 + [200_000 + new] * (64 if new else 0)
        return chain_hashes(tokens, BLOCK)

    for number in range(PREFIXES):
        router.route(str(number), prompt(number), 576)
        router.first_token(str(number))
        router.release(str(number))
    for name in [*decode, *prefill]:
        router.observe(name, rng.randrange(8), rng.randrange(3))
    requests = [prompt(rng.randrange(PREFIXES), new) for new in range(1, DECISIONS + 1)]
    times = []
    for index, hashes in enumerate(requests):
        times.append(_quietly(lambda i=index, h=hashes: _timed(router, f"n{i}", h)))  # type: ignore[misc]
        if index >= 4 * WORKERS:
            router.release(f"n{index - 4 * WORKERS}")
    cuts = quantiles(times, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


def _timed(router: Router, name: str, hashes: list[bytes]) -> float:
    started = time.thread_time()
    router.route(name, hashes, 640)
    return time.thread_time() - started


def _quietly(measure: Callable[[], float]) -> float:
    gc.disable()
    try:
        return measure()
    finally:
        gc.enable()


def main() -> None:
    """Print both tables, and what they were taken on."""
    torch.set_num_threads(1)
    machine: dict[str, Any] = describe_machine()
    print(f"{machine['cpu']}, one core; {machine['date']}; load {machine['load_average']}\n")
    print("| running sequences | steady | one joins, one leaves |\n|---|---|---|")
    for running in RUNNING:
        steady, changing = (scheduling_cost(running, changes) for changes in (False, True))
        print(f"| {running:,} | {steady * 1e6:.0f} µs | {changing * 1e6:.0f} µs |")
    cost = routing_cost()
    print(f"\nrouter, {WORKERS:,} workers, {PREFIXES:,} cached prefixes: ", end="")
    print(f"p50 {cost['p50'] * 1e6:.0f} µs, p99 {cost['p99'] * 1e6:.0f} µs per request")


if __name__ == "__main__":
    main()
