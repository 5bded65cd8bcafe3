"""`make bench-prediction`: what the simulator predicts against what the cluster does.

For each way of serving it starts a cluster, replays arrivals on it at several loads, and the same
arrivals in the simulator, with the mean of two profiles that `tandem profile`'s own code took of
the cluster just before and just after. Nothing is fitted to the replays. Writes a table and the raw
figures beside the other benchmarks' results.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from benchmarks.launch import ClusterError, running_cluster
from benchmarks.machine import describe_machine
from benchmarks.measures import RequestRecord, percentile
from benchmarks.models import qwen_shaped_model
from benchmarks.report import machine_line, save
from benchmarks.run import LoadError, replay
from benchmarks.scenario import MODES, Mode, Scenario, bundled, qwen
from benchmarks.serving import RESULTS, TRACE, plan_workload
from benchmarks.workload import PlannedRequest
from tandem.core.errors import TandemError
from tandem.profiler import Target, find_target, measure_profile
from tandem.simulator import ClusterSpec, Profile, TraceRequest, simulate
from tandem.simulator.profile import save_profile

CLIENT_NICENESS = 0
"""A client that gives way to the servers stamps tokens late when the cores are few."""
PERCENTS = (50, 99)
LOADS = {"bundled": (4.0, 8.0, 12.0), "qwen": (0.3, 0.6, 0.9)}
"""Requests per second."""
SECONDS = 40.0
"""How long each load's arrivals last."""


@dataclass(frozen=True)
class Comparison:
    """One load: the same figures measured and predicted, in seconds."""

    mode: Mode
    rate: float
    requests: int
    measured: dict[str, float]
    predicted: dict[str, float]

    def error(self, name: str) -> float:
        """(predicted - measured) / measured."""
        return self.predicted[name] / self.measured[name] - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    machine = describe_machine()
    scenario = bundled() if options.model == "bundled" else qwen(qwen_shaped_model())
    results = Path(options.results)
    compared: list[Comparison] = []
    try:
        for mode in MODES if options.mode == "both" else (options.mode,):
            compared += _compare(scenario, mode, options, results)
    except (ClusterError, LoadError, TandemError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    markdown = "\n\n".join([f"### {scenario.title}", render(compared), machine_line(machine)])
    table, raw = save(
        results, markdown, {"machine": machine, "compared": [vars(c) for c in compared]}
    )
    print(f"\n{markdown}\n\nTable: {table}\nRaw results: {raw}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    add = parser.add_argument
    add("--model", choices=sorted(LOADS), default="bundled")
    add("--mode", choices=("both", *MODES), default="both")
    add("--rates", type=_rates, help="requests per second of each load, such as 4,8,12")
    add("--seconds", type=float, default=SECONDS, help="how long each load's arrivals last")
    add("--trace", default=str(TRACE), help="Azure LLM inference trace; absent: a synthetic mix")
    add("--results", default=str(RESULTS), metavar="DIR", help="where table and profiles go")
    return parser


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(rate) for rate in text.split(","))


def _compare(
    scenario: Scenario, mode: Mode, options: argparse.Namespace, results: Path
) -> list[Comparison]:
    """Replay every load on one cluster, each between two profiles, and predict from these."""
    loads = []
    with running_cluster(scenario.config(mode)) as cluster:
        config, gateway = scenario.config(mode), f"{cluster.host}:{cluster.port}"
        target = find_target(config, cluster.controller_address, gateway)
        profiles = [_profile(target, scenario, mode)]
        for rate in options.rates or LOADS[scenario.key]:
            load = replace(scenario, rate=rate, requests=max(8, int(rate * options.seconds)))
            load = replace(load, shared_fraction=0.0)
            requests, _ = plan_workload(load, Path(options.trace))
            print(f"{mode}: {len(requests)} requests, {rate:g} a second", flush=True)
            records, _ = replay(load, cluster, _distinct(requests, rate), CLIENT_NICENESS)
            loads.append((load, requests, measured(records)))
            profiles.append(_profile(target, scenario, mode))
    results.mkdir(parents=True, exist_ok=True)
    for number, profile in enumerate(profiles):
        save_profile(profile, results / f"profile-{scenario.key}-{mode}-{number}.yaml")
    return [
        Comparison(
            mode,
            load.rate,
            len(requests),
            figures,
            mean_of([predict(load, mode, profile, requests) for profile in around]),
        )
        for (load, requests, figures), around in zip(loads, pairwise(profiles), strict=True)
    ]


def mean_of(predictions: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each figure: a machine drifts between two profiles."""
    return {name: fmean(each[name] for each in predictions) for name in predictions[0]}


def _profile(target: Target, scenario: Scenario, mode: Mode) -> Profile:
    """Take a profile as soon as what was served before has ended."""
    print(f"{mode}: taking a profile", flush=True)

    async def measure() -> Profile:
        await target.until_idle()
        name = f"{scenario.key}-{mode}"
        return await measure_profile(target, name, lambda line: print(line, flush=True))

    return asyncio.run(measure())


def _distinct(requests: Sequence[PlannedRequest], rate: float) -> list[PlannedRequest]:
    """Loads share their lengths, so turn the prompts: no load finds the prefixes of another."""
    turn = int(rate * 10)
    return [
        replace(request, prompt=request.prompt[turn:] + request.prompt[:turn])
        for request in requests
    ]


def predict(
    scenario: Scenario, mode: Mode, profile: Profile, requests: Sequence[PlannedRequest]
) -> dict[str, float]:
    """Return what the simulator says of a workload."""
    config = scenario.config(mode)
    spec = ClusterSpec(profile, config, config.controller.prefill_workers, 1)
    trace = [TraceRequest(r.at, len(r.prompt), r.max_tokens) for r in requests]
    report = simulate(trace, spec)
    ttfts = {f"ttft_p{percent}": percentile(report.ttfts, percent) or 0.0 for percent in PERCENTS}
    return ttfts | {f"itl_p{percent}": report.gaps.percentile(percent) for percent in PERCENTS}


def measured(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Return the same figures of a replay. Raises `LoadError` if a request failed."""
    if failed := [record for record in records if not record.ok]:
        raise LoadError(f"{len(failed)} requests failed: {failed[0].error or 'tokens are missing'}")
    values = {
        "ttft": [record.ttft for record in records],
        "itl": [gap for record in records for gap in record.gaps],
    }
    return {
        f"{name}_p{percent}": percentile(series, percent) or 0.0
        for name, series in values.items()
        for percent in PERCENTS
    }


def render(compared: Sequence[Comparison]) -> str:
    """Return the table, as Markdown: measured, predicted and the error of each figure."""
    names = [f"{name} p{percent}" for name in ("TTFT", "ITL") for percent in PERCENTS]
    lines = [
        "| serving | load req/s | " + " | ".join(f"{name} ms" for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for each in compared:
        cells = [
            f"{each.measured[key] * 1e3:.1f} / {each.predicted[key] * 1e3:.1f} "
            f"({each.error(key):+.0%})"
            for key in (name.lower().replace(" ", "_") for name in names)
        ]
        lines.append(f"| {each.mode} | {each.rate:g} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Measured / predicted (error)."])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so clusters are stopped
    sys.exit(main())
