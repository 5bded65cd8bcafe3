"""`tandem trace`: what the workers and gateways of a live cluster did, as a page and as data."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.table import Table

from tandem.commands.options import ControllerAddress
from tandem.commands.progress import READY
from tandem.commands.status import default_controller, fetch
from tandem.commands.terminal import console
from tandem.core.errors import ConfigError, UnavailableError
from tandem.timeline.breakdown import breakdown
from tandem.timeline.events import Timeline
from tandem.timeline.page import render_page
from tandem.tracing.collect import Target
from tandem.tracing.collect import trace as collect
from tandem.tracing.merge import Recording, merge
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

MOST_SECONDS = 3600.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|)")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "": 1.0}


def trace(
    controller: ControllerAddress = "",
    last: Annotated[str, typer.Option(metavar="DURATION", help="such as 30s, 500ms, 2m")] = "10s",
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw a page that needs no server")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write every event, a line each")
    ] = None,
) -> None:
    """Record what runs where, and say where the time of requests goes.

    Waits until --last is recorded, unless that is recorded already.
    """
    seconds = parse_duration(last)
    for file in (timeline, as_json):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file}: the directory does not exist")
    address = controller or default_controller()
    with grpc.insecure_channel(address) as channel:
        status = fetch(cluster_pb2_grpc.ClusterStub(channel), address)
    targets = targets_of(status)
    console.print(f"recording {seconds:g} s of {len(targets)} processes", style="dim")
    recordings = asyncio.run(collect(targets, seconds))
    merged = merge(recordings)
    workers = [recording.process for recording in recordings if not recording.is_gateway]
    if timeline is not None:
        title = f"{status.model}: {seconds:g} s of {len(workers)} workers"
        page = render_page(merged, workers, title, "; ".join(notes(recordings)))
        timeline.write_text(page, encoding="utf-8")
    if as_json is not None:
        as_json.write_text("".join(f"{line}\n" for line in json_lines(merged)), encoding="utf-8")
    _report(merged, recordings)


def parse_duration(text: str) -> float:
    """Return seconds. Raises `ConfigError`."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0.0 < seconds <= MOST_SECONDS:
        raise ConfigError(
            f"--last {text}: expected a duration such as 30s, 500ms or 2m, at most an hour"
        )
    return seconds


def targets_of(status: cluster_pb2.ClusterStatus) -> list[Target]:
    """Every process to ask: workers that are ready, prefill first, and gateways.

    Raises `UnavailableError` when no worker is ready.
    """
    ready = [worker for worker in status.workers if worker.state == READY]
    if not ready:
        raise UnavailableError("no worker is ready, so there is nothing to trace")
    ready.sort(key=lambda worker: (worker.role, worker.name))
    targets = [Target(worker.name, worker.address) for worker in ready]
    gateways = [gateway for gateway in status.gateways if gateway.tracing_address]
    return targets + [Target(each.gateway_id, each.tracing_address, True) for each in gateways]


def notes(recordings: Iterable[Recording]) -> list[str]:
    """What a reader must know: clocks that were set right, and events that gave way."""
    found = []
    for recording in recordings:
        if recording.clock_offset:
            offset, error = recording.clock_offset, recording.clock_error * 1e3
            found.append(
                f"{recording.process}: its clock was {offset:.6f} s ahead, within {error:.3f} ms"
            )
        if recording.truncated:
            found.append(f"{recording.process}: its oldest events gave way to newer ones")
    return found


def json_lines(timeline: Timeline) -> list[str]:
    """Every event as JSON, in order of time, in seconds on the collector's clock."""
    rows: list[tuple[float, dict[str, Any]]] = []
    for box in timeline.iterations:
        parts = [part._asdict() for part in box.parts]
        rows.append((box.began, {"event": "iteration", **box._asdict(), "parts": parts}))
    rows += [(kv.began, {"event": "transfer", **kv._asdict()}) for kv in timeline.transfers]
    rows += [(stage.at, {"event": "stage", **stage._asdict()}) for stage in timeline.stages]
    rows.sort(key=lambda row: row[0])
    return [json.dumps(row) for _, row in rows]


def _report(timeline: Timeline, recordings: list[Recording]) -> None:
    requests = {stage.request for stage in timeline.stages}
    console.print(
        f"{len(timeline.iterations)} iterations, {len(timeline.transfers)} KV pieces, "
        f"{len(requests)} requests"
    )
    for note in notes(recordings):
        console.print(note, style="yellow", markup=False)
    steps = breakdown(timeline)
    if not steps:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("step", overflow="fold")
    for heading in ("requests", "p50 ms", "p99 ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in steps:
        p50, p99 = (f"{step.percentile(percent) * 1e3:.3f}" for percent in (50, 99))
        table.add_row(step.name, str(len(step.seconds)), p50, p99)
    console.print(table)
