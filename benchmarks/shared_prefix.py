"""`make bench-shared-prefix`: what routing makes of prompts that begin alike, in the simulator.

Four prefill and eight decode workers of an 8-billion-parameter model (a computed profile), lending
off, so that every prompt goes through the prefill pool. Prints a Markdown row per workload: prompt
tokens that nobody computed, time to first token, and how even the prefill workers' work was; means
over several seeds, and the range of the last percentile.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import NamedTuple

from benchmarks.measures import percentile
from tandem.core.config import TandemConfig
from tandem.simulator import ClusterSpec, TraceRequest, load_profile, simulate
from tandem.simulator.trace import HASHED_TOKENS
from tandem.timeline.events import Timeline

PROFILE = Path(__file__).parent.parent / "docs/profiles/roofline-8b.yaml"
NUM_PREFILL, NUM_DECODE = 4, 8
OUTPUT = 8


def shared(count: int, rate: float, systems: int, tail: int, seed: int) -> list[TraceRequest]:
    """Prompts of 2,048 tokens of one of some system prompts and a tail of their own.

    The first of each comes alone and is done before the next: one worker has it when the crowd
    comes.
    """
    rng, at, trace = Random(seed), 0.0, []
    for number in range(count):
        is_first = number < systems
        system = number if is_first else rng.randrange(systems)
        hashes = (*(100 * system + part for part in range(4)), 10**6 + number)
        trace.append(TraceRequest(at, 4 * HASHED_TOKENS + tail, OUTPUT, hashes))
        at += 0.2 if is_first else rng.expovariate(rate)
    return trace


def conversations(count: int, rate: float, people: int, seed: int) -> list[TraceRequest]:
    """Turns of people who each add 512 tokens to what nobody else has, up to eight times."""
    rng, at, trace = Random(seed), 0.0, []
    histories: dict[int, list[int]] = {}
    fresh = iter(range(10**9))
    for _ in range(count):
        person = rng.randrange(people)
        history = histories.setdefault(person, [])
        if len(history) == 8:
            history.clear()
        history.append(next(fresh))
        trace.append(TraceRequest(at, len(history) * HASHED_TOKENS, OUTPUT, tuple(history)))
        at += rng.expovariate(rate)
    return trace


def mixed(count: int, rate: float, seed: int) -> list[TraceRequest]:
    """As many of the short tails as of the turns."""
    turns = conversations(count // 2, rate / 2, 200, seed)
    moved = [turn._replace(hash_ids=tuple(2 * 10**9 + i for i in turn.hash_ids)) for turn in turns]
    return sorted([*shared(count // 2, rate / 2, 4, 16, seed), *moved])


WORKLOADS: dict[str, Callable[[int], list[TraceRequest]]] = {
    "one system prompt, tails of 16, 100/s": lambda seed: shared(2000, 100, 1, 16, seed),
    "one system prompt, tails of 16, 400/s": lambda seed: shared(4000, 400, 1, 16, seed),
    "one system prompt, tails of 16, 800/s": lambda seed: shared(6000, 800, 1, 16, seed),
    "16 system prompts, tails of 128, 300/s": lambda seed: shared(8000, 300, 16, 128, seed),
    "own conversations of 200 people, 60/s": lambda seed: conversations(3000, 60, 200, seed),
    "four system prompts and 200 people, 150/s": lambda seed: mixed(4000, 150, seed),
}


class Outcome(NamedTuple):
    """What became of one trace. Times in milliseconds."""

    hit_rate: float
    ttft_p50: float
    ttft_p99: float
    evenness: float
    """Prompts that the busiest prefill worker had a part in, over the mean."""


def measure(trace: list[TraceRequest], policy: str, seed: int = 0) -> Outcome:
    """Run a trace."""
    config = TandemConfig.model_validate(
        {
            "scheduler": {"max_batch_tokens": 2048, "chunk_size": 512},
            "lending": {"mode": "off"},
            "gateway": {"router": {"policy": policy}},
        }
    )
    spec = ClusterSpec(load_profile(PROFILE), config, NUM_PREFILL, NUM_DECODE, seed)
    timeline = Timeline()
    report = simulate(trace, spec, recorder=timeline)
    computed = 0
    prompts: Counter[str] = Counter({f"prefill-{index}": 0 for index in range(NUM_PREFILL)})
    for iteration in timeline.iterations:
        if iteration.worker in prompts:
            computed += sum(part.length for part in iteration.parts)
            prompts[iteration.worker] += len(iteration.parts)
    asked = sum(request.prompt_len for request in trace)
    p50, p99 = (1e3 * (percentile(report.ttfts, percent) or 0.0) for percent in (50, 99))
    evenness = max(prompts.values()) / fmean(prompts.values())
    return Outcome(1 - computed / asked, p50, p99, evenness)


def row(outcomes: Sequence[Outcome]) -> str:
    """Return the cells of one workload's row."""
    means = Outcome(*map(fmean, zip(*outcomes, strict=True)))
    p99s = [outcome.ttft_p99 for outcome in outcomes]
    p99 = f"{means.ttft_p99:.1f} ({min(p99s):.1f} to {max(p99s):.1f}) ms"
    return f"{means.hit_rate:.1%} | {means.ttft_p50:.1f} ms | {p99} | {means.evenness:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_prefix", description=__doc__)
    parser.add_argument("--policy", default="prefix_aware", help="of the router")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each workload")
    options = parser.parse_args(arguments)
    print("| workload | hit rate | TTFT p50 | TTFT p99 | load, max/mean |")
    print("|---|---|---|---|---|")
    for name, make in WORKLOADS.items():
        seeds = range(1, options.seeds + 1)
        outcomes = [measure(make(seed), options.policy, seed) for seed in seeds]
        print(f"| {name} | {row(outcomes)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
