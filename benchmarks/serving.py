"""`make bench`: disaggregated against colocated serving on the same cores, one table per model.

For each model it makes one workload, then runs it on a fresh cluster of either kind in turn
(A B A B ...), so that a machine that gets busier or warmer does it to both. What the columns mean
and how to read them is docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.client import ROOT, LoadError
from benchmarks.launch import ClusterError
from benchmarks.load import NICENESS
from benchmarks.machine import describe_machine
from benchmarks.models import qwen_shaped_model
from benchmarks.report import machine_line, render_table, save
from benchmarks.run import RunResult, measure
from benchmarks.scenario import MODES, Scenario, bundled, quick, qwen
from benchmarks.workload import (
    Mix,
    PlannedRequest,
    describe,
    plan_requests,
    read_trace,
    synthetic_trace,
)
from tandem.core.errors import TandemError
from tandem.modelfiles import read_json, resolve_model

TRACE = ROOT.parent / "shared" / "traces" / "azure_2023_conversation.csv"
RESULTS = ROOT / "benchmarks" / "results"
FIRST_TOKEN_ID = 300
"""Past special tokens and single bytes."""


@dataclass(frozen=True)
class Measured:
    """A scenario with its workload and runs."""

    scenario: Scenario
    source: str
    workload: Sequence[PlannedRequest]
    runs: Sequence[RunResult]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    machine = describe_machine()
    measured = []
    try:
        for scenario in _scenarios(options):
            measured.append(_measure_all(scenario, Path(options.trace), options.client_nice))
            print(f"\n{_section(measured[-1])}\n", flush=True)
    except (ClusterError, LoadError, TandemError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the cluster is stopped", file=sys.stderr)
        return 130
    markdown = "\n\n".join([*(_section(item) for item in measured), machine_line(machine)])
    raw = {"machine": machine, "measured": [_raw(item) for item in measured]}
    table, results = save(Path(options.results), markdown, raw)
    print(f"{machine_line(machine)}\n\nTable: {table}\nRaw results: {results}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    add = parser.add_argument
    add("--model", choices=("bundled", "qwen", "both"), default="both")
    add("--quick", action="store_true", help="bundled model, one short run each: a smoke test")
    add("--runs", type=_positive, help="runs of each way of serving; the table has their medians")
    add("--rate", type=float, help="requests per second")
    add("--requests", type=_positive, help="requests per run")
    add("--length-factor", type=float, help="what the trace's lengths are multiplied by")
    add("--client-nice", type=int, default=NICENESS, help="priority of the load client")
    add("--bundled-model", default="", metavar="DIR", help="another copy of the bundled model")
    add("--trace", default=str(TRACE), help="Azure LLM inference trace; absent: a synthetic mix")
    add("--results", default=str(RESULTS), metavar="DIR", help="where tables and results go")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _scenarios(options: argparse.Namespace) -> list[Scenario]:
    chosen = []
    if options.model in ("bundled", "both"):
        chosen.append(bundled(options.bundled_model))
    if options.model == "qwen" or (options.model == "both" and not options.quick):
        print("making or finding the random-weight model", flush=True)
        chosen.append(qwen(qwen_shaped_model()))
    if options.quick:
        chosen = [quick(scenario) for scenario in chosen]
    given = {
        name: value
        for name in ("runs", "rate", "requests", "length_factor")
        if (value := getattr(options, name)) is not None
    }
    return [replace(scenario, **given) for scenario in chosen]


def _measure_all(scenario: Scenario, trace: Path, niceness: int) -> Measured:
    """Measure both ways of serving in turn, `scenario.runs` times."""
    workload, source = plan_workload(scenario, trace)
    runs: list[RunResult] = []
    total = scenario.runs * len(MODES)
    for _ in range(scenario.runs):
        for mode in MODES:
            started = time.monotonic()
            print(f"{scenario.key} {len(runs) + 1}/{total}: {mode} ", end="", flush=True)
            runs.append(measure(scenario, mode, workload, niceness))
            print(f"({time.monotonic() - started:.0f} s)", flush=True)
    return Measured(scenario, source, workload, runs)


def plan_workload(scenario: Scenario, trace: Path) -> tuple[list[PlannedRequest], str]:
    """Return the scenario's requests and where their times and lengths come from."""
    vocab_size = read_json(resolve_model(scenario.model_path), "config.json")["vocab_size"]
    mix = Mix(
        rate=scenario.rate,
        length_factor=scenario.length_factor,
        shared_fraction=scenario.shared_fraction,
        system_prompt_tokens=scenario.system_prompt_tokens,
        vocabulary=(FIRST_TOKEN_ID, vocab_size),
        max_model_len=scenario.max_model_len,
    )
    if trace.is_file():
        arrivals, source = read_trace(trace, scenario.requests), "Azure 2023 conversation trace"
    else:
        arrivals = synthetic_trace(scenario.requests)
        source = "synthetic mix with the statistics of the Azure 2023 conversation trace"
    return plan_requests(arrivals, mix), source


def _section(measured: Measured) -> str:
    """One model's heading, load, table and footnote, as markdown."""
    scenario, runs = measured.scenario, measured.runs
    load, limits = describe(measured.workload), scenario.objectives
    figures = {str(mode): [run.figures for run in runs if run.mode == mode] for mode in MODES}
    intro = (
        f"{len(measured.workload)} requests of the {measured.source}, {scenario.rate:g} a second, "
        f"lengths ×{scenario.length_factor:g} (mean {load['mean_prompt_tokens']:.0f} tokens in, "
        f"{load['mean_output_tokens']:.0f} out); {load['shared_fraction']:.0%} share a prefix of "
        f"{scenario.system_prompt_tokens} tokens. Objectives: TTFT ≤ {limits.ttft:g} s, "
        f"TPOT ≤ {limits.tpot * 1000:g} ms. Runs of each: {scenario.runs}; medians (range)."
    )
    return "\n\n".join([f"### {scenario.title}", intro, render_table(figures), _footnote(runs)])


def _footnote(runs: Sequence[RunResult]) -> str:
    """What the client cost and who else used the machine: how far the figures can be trusted."""
    lag = max(run.client.lag_p99 or 0.0 for run in runs)
    cost = max(run.client.core_share for run in runs)
    foreign = max(run.foreign_share for run in runs)
    errors = sorted({record.error for run in runs for record in run.records if record.error})
    return (
        f"Workers: nice {runs[0].worker_niceness}. Client: nice {runs[0].client.niceness}, "
        f"≤ {cost:.1%} of a core, timer lag p99 ≤ {lag * 1000:.1f} ms. "
        f"Others took ≤ {foreign:.0%} of the machine during a run."
        + "".join(f"\n- failed: {error}" for error in errors)
    )


def _raw(measured: Measured) -> dict[str, Any]:
    scenario = measured.scenario
    return {
        "scenario": {
            name: getattr(scenario, name)
            for name in ("key", "title", "dtype", "rate", "requests", "runs", "length_factor")
        },
        "objectives": vars(scenario.objectives),
        "source": measured.source,
        "workload": describe(measured.workload),
        "runs": [run.as_json() for run in measured.runs],
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so clusters are stopped
    sys.exit(main())
