"""`make bench-cluster`: serving systems on the same two cores under a sweep of load.

Every system gets the same requests at the same times. Systems are started one after the other,
warmed up, then each rate is run to its end. Those with a core for each phase also run eight streams
alone and beside long prompts, three times. Results are kept in benchmarks/measured/cluster.json and
shown by docs/performance.md; systems that are not measured this time keep their rows.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.client import LoadError, run_client
from benchmarks.cluster.interference import MARGIN as INTERFERENCE_MARGIN
from benchmarks.cluster.interference import all_began, compare, plan_long_prompts, plan_streams
from benchmarks.cluster.page import update_pages
from benchmarks.cluster.plan import Sweep, plan_arrivals, plan_warm_up, read_lengths
from benchmarks.cluster.systems import SYSTEMS, Endpoint, System
from benchmarks.foreign import foreign_load
from benchmarks.launch import ClusterError
from benchmarks.load import NICENESS
from benchmarks.machine import describe_machine
from benchmarks.measures import Objectives, RequestRecord, summarize
from benchmarks.models import qwen_shaped_model
from benchmarks.options import some_of
from benchmarks.peers.environments import UnavailableError
from benchmarks.results import MEASURED, merge, read_results, write_results
from benchmarks.servers import raise_on_signals
from tandem.profiler.machine import today

RESULTS = MEASURED / "cluster.json"
CORES = 2
OBJECTIVES = Objectives(ttft=4.0, tpot=0.12, gap=0.5)
RATES, SECONDS = (0.4, 0.8, 1.2), 60.0
INTERFERENCE_RUNS = 3
START_AND_DRAIN = 90.0
"""Seconds beside the load itself that a system takes, all rates together, roughly."""
Failure = (UnavailableError, ClusterError, LoadError)


@dataclass(frozen=True)
class Plan:
    """What every system is asked."""

    sweeps: tuple[Sweep, ...]
    rates: bool = True
    interference: bool = True

    @property
    def seconds(self) -> float:
        """How long one system takes, roughly."""
        return sum(sweep.seconds for sweep in self.sweeps) * self.rates + START_AND_DRAIN


def measure_system(
    system: System, plan: Plan, model: Path, cores: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Start a system, run everything, stop it; returns its rows by group. A failure is in them."""
    row: dict[str, Any] = {"name": system.name, "cores": system.cores, "date": today(), "rates": {}}
    groups = {"systems": {system.key: row}} if plan.rates else {}
    try:
        with system.open(model, cores) as endpoint:
            run(endpoint, plan_warm_up(plan.sweeps[0]))
            for sweep in plan.sweeps if plan.rates else ():
                row["rates"][f"{sweep.rate:g}"] = _measure_rate(endpoint, sweep)
            if system.split and plan.interference:
                found = _measure_interference(endpoint, plan.sweeps[0].vocab_size)
                groups["interference"] = {system.key: {"name": system.name, **found}}
    except Failure as error:
        row["unavailable"] = str(error).partition("\n")[0]
        print(f"  {error}", flush=True)
    return groups


def run(endpoint: Endpoint, requests: Sequence[Any]) -> list[RequestRecord]:
    """Send requests that must all end well. Raises `LoadError`."""
    records, _ = run_client(endpoint.job(requests))
    if failed := [record for record in records if not record.ok]:
        raise LoadError(f"a request failed: {failed[0].error or 'tokens are missing'}")
    return records


def _measure_rate(endpoint: Endpoint, sweep: Sweep) -> dict[str, Any]:
    requests = plan_arrivals(read_lengths(), sweep)
    with foreign_load() as load:
        records, client = run_client(endpoint.job(requests))
    figures = summarize(records, OBJECTIVES)
    print(f"  {sweep.rate:g} req/s, {len(requests)} requests: {_brief(figures)}", flush=True)
    errors = sorted({record.error for record in records if record.error})
    return {
        **{name: None if value is None else round(value, 4) for name, value in figures.items()},
        **load.as_json(),
        "client_lag_p99": client.lag_p99,
        "client_core_share": round(client.core_share, 4),
        "errors": errors[:3],
    }


def _brief(figures: dict[str, float | None]) -> str:
    shown = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "itl_max", "attainment", "goodput")
    return ", ".join(f"{name} {figures[name] or 0:.3f}" for name in shown)


def _measure_interference(endpoint: Endpoint, vocab_size: int) -> dict[str, Any]:
    """Compare several times; returns every run, in the order of their ratios."""
    results, loads = [], []
    for number in range(INTERFERENCE_RUNS):
        alone = run(endpoint, plan_streams(vocab_size, f"alone {number}"))
        began = all_began(alone) * INTERFERENCE_MARGIN
        streams = plan_streams(vocab_size, f"beside {number}")
        with foreign_load() as load:
            prompts = plan_long_prompts(vocab_size, began, f"long prompts {number}")
            records = run(endpoint, streams + prompts)
        try:
            results.append(compare(alone, records))
        except ValueError as error:
            print(f"  {error}", flush=True)
            continue
        loads.append(load.as_json())
        print(f"  decode beside prefill: {results[-1].ratio:.2f} x alone", flush=True)
    if not results:
        raise LoadError("the streams and the prompts never ran at the same time")
    results.sort(key=lambda result: result.ratio)
    return {
        "runs": [{**asdict(result), "ratio": result.ratio} for result in results],
        "foreign": max(load["foreign"] for load in loads),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, keep and show; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.show:
        update_pages(read_results(RESULTS))
        return 0
    raise_on_signals()
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    systems = [s for s in SYSTEMS if not options.only or s.key in options.only]
    plan = Plan(
        tuple(Sweep(rate, options.seconds, seed=options.seed) for rate in options.rates),
        rates=not options.no_rates,
        interference=not options.no_interference,
    )
    minutes = plan.seconds * len(systems) / 60
    print(f"{len(systems)} systems, about {minutes:.0f} minutes in all", flush=True)
    try:
        for system in systems:
            started = time.monotonic()
            print(system.name, flush=True)
            keep(options, measure_system(system, plan, qwen_shaped_model(), cores))
            print(f"  ({time.monotonic() - started:.0f} s)", flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted; everything is stopped; finished systems are kept", file=sys.stderr)
        return 130
    update_pages(read_results(RESULTS))
    print(f"figures: {RESULTS}; shown by docs/performance.md and README.md")
    return 0


def keep(options: argparse.Namespace, rows: dict[str, Any]) -> None:
    """Merge rows into the results, with what they were measured on and how."""
    run_with = {
        "seconds": options.seconds,
        "seed": options.seed,
        "client_niceness": NICENESS,
        "objectives": asdict(OBJECTIVES),
        "length_factor": Sweep(1.0, 1.0).length_factor,
    }
    fresh: dict[str, Any] = {"machine": describe_machine(), **rows}
    if "systems" in rows:
        fresh["load"] = run_with
    write_results(RESULTS, merge(read_results(RESULTS), fresh))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster.run", description=__doc__)
    add = parser.add_argument
    keys = [system.key for system in SYSTEMS]
    shown = f"systems to measure: {', '.join(keys)}"
    add("--only", type=some_of(keys), metavar="A,B", help=shown)
    add("--rates", type=_rates, default=RATES, metavar="R,R", help="requests per second")
    add("--seconds", type=float, default=SECONDS, help="how long requests arrive at each rate")
    add("--seed", type=int, default=1, help="of arrivals, lengths and prompts")
    add("--no-rates", action="store_true", help="only decode beside prefill")
    add("--no-interference", action="store_true", help="leave out decode beside prefill")
    add("--show", action="store_true", help="only write the pages again from what is stored")
    return parser


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(rate) for rate in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
