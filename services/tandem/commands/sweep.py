"""The `--sweep` of `tandem simulate`: a table of many simulations, and pictures of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from tandem.commands.plots import shown, write_plots
from tandem.commands.terminal import console
from tandem.commands.trials import parallel_map
from tandem.core.errors import ConfigError
from tandem.core.pairs import parse_pairs
from tandem.simulator.cluster import ClusterSpec
from tandem.simulator.report import SLO_NAMES, Report
from tandem.simulator.sweep import Axis, Point, Row, run_point, sweep_points, table
from tandem.simulator.trace import TraceRequest

_COLUMNS = {
    "ttft_p50": "TTFT p50 s",
    "ttft_p99": "p99",
    "itl_p50": "ITL p50 s",
    "itl_p99": "p99",
    "slo_met": "met",
    "goodput": "goodput",
    "goodput_per_worker": "per worker",
    "prefill_busy": "P busy",
    "decode_busy": "D busy",
}

_WIDEST = 1000
"""Characters of a table's line, whatever the terminal."""


def run_sweep(
    trace: list[TraceRequest],
    spec: ClusterSpec,
    slo: Mapping[str, float],
    axes: Sequence[Axis],
    jobs: int,
    plot: Path | None,
    as_json: bool,
    title: str,
) -> None:
    """Simulate every point, print the table and draw it. Raises `ConfigError`."""
    if not axes:
        raise ConfigError("--plot draws a sweep: name at least one --sweep NAME=VALUES")
    points = sweep_points(spec, axes)
    with parallel_map(min(jobs, len(points))) as run:
        reports: list[Report] = run(partial(_run, trace, slo), points)
    rows = table(axes, points, reports)
    if as_json:
        typer.echo(json.dumps(finite(rows)))
    else:
        grid = _render(axes, rows)  # whole figures: rather a wide line than half a number
        room = console.options.update(max_width=_WIDEST)
        width = max(console.width, console.measure(grid, options=room).maximum)
        Console(file=console.file, width=width, highlight=False).print(grid)
    if plot is not None:
        for path in write_plots(plot, f"{title}, {spec.profile.name}", axes, rows):
            typer.echo(f"drawn into {path}", err=True)


def _run(trace: list[TraceRequest], slo: Mapping[str, float], point: Point) -> Report:
    return run_point(point, trace, slo)


def _render(axes: Sequence[Axis], rows: Sequence[Row]) -> Table:
    grid = Table(box=None, header_style="bold")
    for name in [*(axis.name for axis in axes), *_COLUMNS.values()]:
        grid.add_column(name, justify="right")
    for row in rows:
        grid.add_row(*(shown(row[name]) for name in [*(axis.name for axis in axes), *_COLUMNS]))
    return grid


def parse_slo(text: str) -> dict[str, float]:
    """Return objectives by name. Raises `ConfigError`."""
    try:
        objectives = parse_pairs(text)
    except ValueError as error:
        raise ConfigError(f"--slo {text}: {error}") from error
    unknown = [name for name in objectives if name not in SLO_NAMES]
    if unknown:
        raise ConfigError(f"--slo: {unknown[0]!r} is unknown; there are {', '.join(SLO_NAMES)}")
    return objectives


def finite(value: Any) -> Any:
    """JSON has no NaN: None says that there was nothing to measure."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
