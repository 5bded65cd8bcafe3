"""`tandem simulate`: a trace through a simulated cluster, and what it was like."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.commands.options import takes_config
from tandem.commands.sweep import finite, parse_slo, run_sweep
from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError
from tandem.scheduler import policy_name
from tandem.simulator import ClusterSpec, Report, load_profile, read_trace
from tandem.simulator import simulate as run_simulation
from tandem.simulator.sweep import parse_axis
from tandem.timeline.events import Timeline
from tandem.timeline.page import render_page


@takes_config
def simulate(
    config: TandemConfig,
    trace: Annotated[Path, typer.Option(help="Azure CSV, Mooncake or own JSON lines")],
    profile: Annotated[Path, typer.Option(help="what a worker costs, YAML or JSON")],
    prefill: Annotated[int, typer.Option(min=0, help="prefill workers; 0: colocated")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="decode workers")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="first requests only")] = None,
    speed: Annotated[float, typer.Option(min=1e-6, help="how much faster they come")] = 1.0,
    slo: Annotated[
        str, typer.Option(help="objectives in seconds: ttft, tpot, itl (the longest gap)")
    ] = "ttft=2,tpot=0.1",
    seed: Annotated[int, typer.Option(help="of the router's tie-breaks")] = 0,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="simulate every value: rate=1,2 split=1:3,2:2 chunk=256,512 policy=a,b/c, or any "
            "setting by its full name; several --sweep: every combination",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="draw the sweep into this file's .png and .html")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="processes for a sweep; 0: one per core")] = 0,
    timeline: Annotated[
        Path | None, typer.Option(help="draw what ran where into this HTML file")
    ] = None,
    timeline_seconds: Annotated[float, typer.Option(help="how much of the run to draw")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run a trace through a simulated cluster and print latencies, goodput and use."""
    objectives = parse_slo(slo)
    spec = ClusterSpec(load_profile(profile), config, prefill, decode, seed)
    requests = read_trace(trace, limit, speed)
    if sweep or plot is not None:
        if timeline is not None:
            raise ConfigError("--timeline shows one run: it does not go with --sweep")
        axes = [parse_axis(text) for text in sweep or ()]
        run_sweep(requests, spec, objectives, axes, jobs, plot, as_json, str(trace.name))
        return
    recorder = Timeline(timeline_seconds) if timeline is not None else None
    began = time.perf_counter()
    report = run_simulation(requests, spec, objectives, recorder)
    took = time.perf_counter() - began
    if timeline is not None and recorder is not None:
        names = [f"prefill-{i}" for i in range(prefill)] + [f"decode-{i}" for i in range(decode)]
        page = render_page(recorder, names, f"simulated: {trace.name}", describe_pools(spec))
        timeline.write_text(page, encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(finite(report.summary())))
    else:
        typer.echo(describe(report, spec))
        typer.echo(f"simulated {report.seconds:.0f} s in {took:.1f} s")


def describe(report: Report, spec: ClusterSpec) -> str:
    """What people see."""
    summary: dict[str, Any] = report.summary()
    lines = [
        describe_pools(spec),
        f"requests   {summary['requests']} finished, {summary['refused']} refused",
        *(
            f"{name.upper():10} p50 {v['p50']:.4g} s   p90 {v['p90']:.4g} s   p99 {v['p99']:.4g} s"
            for name, v in ((name, summary[name]) for name in ("ttft", "itl", "tpot"))
        ),
        f"goodput    {summary['goodput']:.3f} requests/s; "
        f"{summary['slo_met']:.1%} meet {_slo(report)}",
        f"output     {summary['output_tokens_per_second']:.0f} tokens/s",
        *(
            f"{role:10} busy {use['busy']:.0%}, blocks mean {use['blocks_mean']:.0%} "
            f"max {use['blocks_max']:.0%}, {use['tokens_per_iteration']:.0f} tokens per iteration"
            for role, use in summary["pools"].items()
            if report.pools[role].num_workers
        ),
        f"preempted  {summary['preemptions']}",
    ]
    if spec.num_prefill:
        lines.append(
            f"lent       {summary['lent_tokens']} prompt tokens to prefill, "
            f"{summary['kept_tokens']} output tokens to decode"
        )
        exposed = summary["exposed_transfer"]
        lines.append(
            f"links      busy {summary['link_busy']:.1%}, {summary['kv_bytes'] / 1e9:.1f} GB; "
            f"exposed p50 {exposed['p50']:.4g} s p99 {exposed['p99']:.4g} s"
        )
    return "\n".join(lines)


def describe_pools(spec: ClusterSpec) -> str:
    """What was simulated, in a line."""
    scheduler = spec.config.scheduler
    pools = f"{spec.num_prefill} prefill + {spec.num_decode} decode"
    if spec.num_prefill == 0:
        policies = f"colocated, {policy_name(scheduler, 'decode')}"
    else:
        policies = f"{policy_name(scheduler, 'prefill')} / {policy_name(scheduler, 'decode')}"
    return f"{pools} ({policies}), profile {spec.profile.name}"


def _slo(report: Report) -> str:
    return ", ".join(f"{name} <= {bound:g} s" for name, bound in report.slo.items()) or "nothing"
