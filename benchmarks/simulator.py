"""`make bench-simulator`: how long a large simulation takes, and how many events a second.

Lengths are drawn at random from the Azure conversation trace, and arrivals are Poisson. One
process, the same scheduler, router and block pools as in a cluster. Lending is off by default here;
`--lending measured` is the default of clusters.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from benchmarks.machine import describe_machine
from benchmarks.report import machine_line
from benchmarks.serving import TRACE
from benchmarks.workload import read_trace, synthetic_trace
from tandem.core.config import TandemConfig
from tandem.simulator import ClusterSpec, TraceRequest, load_profile, simulate

PROFILE = Path(__file__).parent.parent / "docs/profiles/roofline-8b.yaml"
LENGTHS = 10_000
SLO = {"ttft": 1.0, "tpot": 0.03}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    parser.add_argument("--workers", type=int, default=1000, help="two in five prefill")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second and worker")
    parser.add_argument("--trace", type=Path, default=TRACE, help="absent: lengths like its own")
    parser.add_argument("--lending", choices=("off", "threshold", "measured"), default="off")
    options = parser.parse_args(arguments)
    trace = _trace(options.trace, options.requests, options.rate * options.workers)
    prefill = options.workers * 2 // 5
    scheduler = {"max_batch_tokens": 2048, "chunk_size": 512, "preemption": "refill"}
    config = TandemConfig.model_validate(
        {"scheduler": scheduler, "lending": {"mode": options.lending}}
    )
    spec = ClusterSpec(load_profile(PROFILE), config, prefill, options.workers - prefill)
    began = time.perf_counter()
    cpu = time.process_time()
    report = simulate(trace, spec, SLO)
    cpu = time.process_time() - cpu
    took = time.perf_counter() - began
    events = report.output_tokens + sum(use.iterations for use in report.pools.values())
    print(
        f"{options.workers} workers, {report.num_finished} requests, "
        f"{report.output_tokens} tokens, {report.seconds:.0f} s of their time: {took:.1f} s "
        f"({cpu:.1f} s of CPU), {events / took:,.0f} events/s, "
        f"{took / report.num_finished * 1e6:.0f} us a request, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )
    print(f"An event: an iteration, or a token. {report.summary()['slo_met']:.1%} meet {SLO}.")
    print(machine_line(describe_machine()))
    return 0


def _trace(path: Path, count: int, rate: float) -> list[TraceRequest]:
    """Return `count` requests, `rate` a second, of lengths that are drawn from the trace."""
    known = read_trace(path, LENGTHS) if path.is_file() else synthetic_trace(LENGTHS)
    rng, at, requests = Random(1), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        drawn = known[rng.randrange(len(known))]
        requests.append(TraceRequest(at, drawn.prompt_tokens, drawn.output_tokens))
    return requests


if __name__ == "__main__":
    sys.exit(main())
