"""`tandem plan`: the split, chunk and policy with the highest goodput per worker, for a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Annotated

import typer

from tandem.commands.options import takes_config
from tandem.commands.sweep import parse_slo
from tandem.commands.terminal import errors
from tandem.commands.trials import parallel_map
from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError
from tandem.simulator import load_profile, read_trace, simulate
from tandem.simulator.planning import Goal, Outcome, Plan, Trial, make_plan
from tandem.simulator.sweep import at_rate

_SMALLEST_GAIN = 0.01
"""Of the requests: an improvement that helps fewer limits nothing."""


@takes_config
def plan(
    config: TandemConfig,
    trace: Annotated[Path, typer.Option(help="Azure CSV, Mooncake or own JSON lines")],
    profile: Annotated[Path, typer.Option(help="what a worker costs; see tandem profile")],
    slo: Annotated[str, typer.Option(help="objectives in seconds: ttft, tpot, itl (longest gap)")],
    workers: Annotated[int, typer.Option(min=1, help="workers of both roles together")] = 4,
    attainment: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="share of requests that must meet them")
    ] = 0.9,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="how long a stretch of the trace is served")
    ] = 30.0,
    stretches: Annotated[int, typer.Option(min=2, help="that a finalist is measured on")] = 5,
    seed: Annotated[int, typer.Option(help="which stretches are drawn")] = 0,
    requests: Annotated[
        int, typer.Option(min=1, help="about how many to simulate in all; cuts stretches")
    ] = 60_000,
    jobs: Annotated[int, typer.Option(min=0, help="processes; 0: one per core")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Find the cluster that serves a trace at the highest rate within its objectives."""
    objectives = parse_slo(slo)
    if not objectives:
        raise ConfigError("--slo: name at least one objective, such as ttft=1,itl=0.2")
    arrivals = read_trace(trace)
    machine = load_profile(profile)
    goal = Goal(machine, config, workers, attainment, seconds, stretches, seed, requests)
    with parallel_map(jobs) as run:

        def run_trials(trials: Sequence[Trial]) -> list[Outcome]:
            return run(_Simulate(objectives), trials)

        found = make_plan(arrivals, goal, run_trials, lambda line: errors.print(line, style="dim"))
    span = arrivals[-1].arrival
    own_rate = (len(arrivals) - 1) / span if span > 0 else 0.0
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        typer.echo(describe(found, goal, own_rate))


class _Simulate:
    """Runs one trial; an object, so that it can be sent to another process."""

    def __init__(self, objectives: dict[str, float]) -> None:
        self._objectives = objectives

    def __call__(self, trial: Trial) -> Outcome:
        report = simulate(at_rate(trial.trace, trial.rate), trial.spec, self._objectives)
        ended = report.num_finished + report.refusals.total()
        return Outcome(report.num_good / max(ended, 1), dict(report.missed))


def describe(plan: Plan, goal: Goal, own_rate: float) -> str:
    """What people see."""
    best = plan.finalists[0]
    scheduler = goal.config.scheduler
    lines = [
        f"{best.candidate.name}: {best.rate / goal.num_workers:.3g} requests/s per worker "
        f"({goal.attainment:.0%} meet all objectives; {plan.trials} simulations, "
        f"stretches of {plan.stretch_seconds:.0f} s)",
        "",
        "requests/s, 95 % interval",
        *(f"{r.rate:8.3g}  {r.low:.3g} - {r.high:.3g}  {r.candidate.name}" for r in plan.finalists),
    ]
    if not plan.is_sure:
        lines.append("The intervals overlap: on this trace these are not told apart.")
    lines += ["", f"What limits it: {_limits(plan)}"]
    if own_rate:
        count = ceil(own_rate / best.rate * goal.num_workers)
        lines.append(f"The trace as it is ({own_rate:.3g} requests/s) needs {count} such workers.")
    chosen = best.candidate
    budget = max(chosen.chunk, scheduler.max_batch_tokens)
    flags = f"--chunk-size {chosen.chunk} --max-batch-tokens {budget} --policy {chosen.policy}"
    pools = f"--prefill-workers {chosen.num_prefill} --decode-workers {chosen.num_decode}"
    return "\n".join([*lines, "", f"tandem serve {pools} {flags}"])


def _limits(plan: Plan) -> str:
    """Which improvement of the machine helps, a little above the best rate."""
    helps = [x for x in plan.limits if x.slo_met - plan.slo_met_over > _SMALLEST_GAIN]
    missed = ", ".join(f"{name} {count}" for name, count in plan.missed.items() if count)
    now = f"{plan.slo_met_over:.0%} a tenth above that rate (missed: {missed or 'nothing'})"
    if not helps:
        return f"nothing that a better machine of the same kind would change; {now}"
    gains = ", ".join(f"{x.what} (better: {x.slo_met:.0%})" for x in helps)
    return f"{gains}; as it is: {now}"
