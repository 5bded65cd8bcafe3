"""Where the time of a request goes before its tokens flow: `make bench-stages`.

One prefill and one decode worker on the bundled model, as processes of their own without Ray, are
traced while requests come one by one, and while short ones come among long prompts in chunks.
Prints a table per load of the steps that a trace gives (`tandem.timeline.breakdown`), then what
tracing itself costs: the gap between tokens at batch 8 with recording off and on, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/support"))

from benchmarks.machine import describe_machine
from local_cluster import LocalCluster, Recorder, generate, local_cluster, until_ready
from tandem.core.config import TandemConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.gateway.dispatch import Dispatcher
from tandem.timeline.breakdown import Step, breakdown
from tandem.timeline.events import Timeline
from tandem.timeline.page import render_page
from tandem.tracing.buffer import TraceBuffer
from tandem.tracing.collect import Target, recording
from tandem.tracing.merge import Recording, merge

SEED = 1
BATCH, BATCH_TOKENS = 8, 300
RECORD_SECONDS = 600.0
VOCABULARY = range(3, 2000)


class Bench(NamedTuple):
    """A cluster and a dispatcher in this process."""

    cluster: LocalCluster
    dispatcher: Dispatcher
    buffer: TraceBuffer
    rng: random.Random

    @property
    def targets(self) -> list[Target]:
        workers = self.cluster.workers.items()
        return [Target(name, worker.endpoint.address) for name, worker in workers]

    async def request(self, name: str, prompt_len: int, output_len: int) -> None:
        """Send one request of random tokens, unlike any other, and wait for its end."""
        prompt = self.rng.choices(VOCABULARY, k=prompt_len)
        await generate(self.dispatcher, name, prompt, max_tokens=output_len, ignore_eos=True)

    async def gaps(self, name: str) -> list[float]:
        """Send one of a batch, and return the gaps between its tokens."""
        prompt = tuple(self.rng.choices(VOCABULARY, k=40))
        sampling = SamplingParams(max_tokens=BATCH_TOKENS, temperature=0.0, ignore_eos=True)
        request = Request(name, prompt, len(prompt), sampling)
        times = [time.monotonic() async for _ in self.dispatcher.generate(request)]
        return [ended - began for began, ended in pairwise(times[BATCH:])]


async def one_by_one(bench: Bench, requests: int) -> None:
    """Light load: each comes when the one before has ended, and all is idle."""
    for number in range(requests):
        await bench.request(f"light-{number}", 100, 8)
        await asyncio.sleep(0.02)


async def among_long_prompts(bench: Bench, requests: int) -> None:
    """Long prompts, in chunks, keep the prefill worker busy; short requests come all the while."""

    async def long_ones() -> None:
        for number in range(requests // 4):
            await bench.request(f"long-{number}", 1000, 16)

    async def short_ones() -> None:
        for number in range(requests):
            await bench.request(f"short-{number}", 100, 8)
            await asyncio.sleep(0.05)

    await asyncio.gather(long_ones(), short_ones())


LOADS: dict[str, Callable[[Bench, int], Awaitable[None]]] = {
    "one by one, 100 tokens in, 8 out": one_by_one,
    "the same among prompts of 1,000 tokens in chunks of 64": among_long_prompts,
}


@asynccontextmanager
async def started() -> AsyncIterator[Bench]:
    """A warm cluster: links are open and every shape has been seen."""
    config = TandemConfig.model_validate(
        {
            "worker": {"threads": 1},
            "scheduler": {"chunk_size": 64, "max_batch_tokens": 128},
            "cache": {"num_blocks": 2048},
        }
    )
    async with local_cluster(config) as cluster:
        buffer = TraceBuffer("gateway")
        dispatcher = Dispatcher(
            config.gateway, cluster.controller_address, Recorder(), seed=SEED, trace=buffer
        )
        await dispatcher.start()
        try:
            await until_ready(dispatcher)
            bench = Bench(cluster, dispatcher, buffer, random.Random(SEED))
            for number, prompt_len in enumerate((100, 1000, 300)):
                await bench.request(f"warm-{number}", prompt_len, 8)
            yield bench
        finally:
            await dispatcher.close()


async def record(bench: Bench, load: str, requests: int) -> Timeline:
    """Run one load under tracing."""
    began = time.monotonic()
    bench.buffer.record(RECORD_SECONDS)
    async with recording(bench.targets, RECORD_SECONDS) as tracer:
        await LOADS[load](bench, requests)
        recordings = await tracer.collect(began)
    recordings.append(Recording("gateway", bench.buffer.events(began), is_gateway=True))
    bench.buffer.record(0.0)
    return merge(recordings)


async def gap(bench: Bench, number: int, *, on: bool) -> float:
    """Return the median gap between tokens, in seconds, of a batch of 8 that decodes together."""
    async with AsyncExitStack() as stack:
        if on:
            await stack.enter_async_context(recording(bench.targets, RECORD_SECONDS))
            bench.buffer.record(RECORD_SECONDS)
        batch = (bench.gaps(f"gap-{number}-{each}") for each in range(BATCH))
        gaps = [seconds for some in await asyncio.gather(*batch) for seconds in some]
    bench.buffer.record(0.0)
    return statistics.median(gaps)


def table(steps: list[Step]) -> str:
    """The steps as markdown."""
    lines = ["| step | requests | p50 ms | p99 ms |", "|---|---|---|---|"]
    for step in steps:
        p50, p99 = (f"{step.percentile(percent) * 1e3:.2f}" for percent in (50, 99))
        lines.append(f"| {step.name} | {len(step.seconds)} | {p50} | {p99} |")
    return "\n".join(lines)


async def run(options: argparse.Namespace) -> str:
    """Measure; returns what there is to say, as the workers' logs would come in between."""
    machine = describe_machine()
    lines = [f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, load average "
             f"{machine['load_average']} before"]  # fmt: skip
    async with started() as bench:
        for number, load in enumerate(LOADS):
            timeline = await record(bench, load, options.requests)
            lines += [f"\n{load}:\n", table(breakdown(timeline))]
            if options.pages:
                names = [target.name for target in bench.targets]
                page = options.pages / f"load-{number}.html"
                page.write_text(render_page(timeline, names, load), encoding="utf-8")
        gaps: dict[bool, list[float]] = {False: [], True: []}
        for number in range(2 * options.runs):
            on = bool(number % 2)
            gaps[on].append(await gap(bench, number, on=on))
    idle, recorded = (statistics.median(gaps[each]) * 1e3 for each in (False, True))
    lines.append(
        f"\nITL at batch {BATCH}, median of {options.runs} runs of each in turns: "
        f"{idle:.3f} ms with recording off, {recorded:.3f} ms on: {recorded / idle:.3f} times"
    )
    return "\n".join(lines)


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(prog="bench-stages", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100, help="of each load")
    parser.add_argument("--runs", type=int, default=5, help="batches with recording off, and on")
    parser.add_argument("--pages", type=Path, help="draw the timelines into this directory")
    print(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
