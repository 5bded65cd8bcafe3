"""Many simulations that differ in a few settings: which there are, and what each was like.

An axis is `rate` (requests per second; the gaps of the trace are stretched), `split` (workers,
prefill:decode), `chunk` (tokens), `policy` (one for both roles, or prefill/decode), or any setting
by its full name, such as `scheduler.max_running`. Pure: who runs the points, and on how many cores,
is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from pydantic import ValidationError

from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError
from tandem.scheduler import make_policy
from tandem.simulator.cluster import ROLES, ClusterSpec, simulate
from tandem.simulator.report import Report
from tandem.simulator.trace import TraceRequest

AXES = ("rate", "split", "chunk", "policy")


class Axis(NamedTuple):
    """A setting and the values that it takes, as they were written."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One simulation of a sweep."""

    values: tuple[str, ...]
    """Of each axis."""
    spec: ClusterSpec
    rate: float | None = None
    """Requests per second; None: as the trace has it."""


def parse_axis(text: str) -> Axis:
    """Read `NAME=VALUE,VALUE...`. Raises `ConfigError`."""
    name, equals, values = text.partition("=")
    found = tuple(value.strip() for value in values.split(",") if value.strip())
    if not equals or not found:
        raise ConfigError(f"--sweep {text}: expected NAME=VALUE,VALUE..., such as rate=1,2,4")
    if name not in AXES and "." not in name:
        raise ConfigError(
            f"--sweep {name}: unknown; allowed: {', '.join(AXES)}, or a setting by its full name, "
            "such as scheduler.max_running"
        )
    return Axis(name, found)


def sweep_points(spec: ClusterSpec, axes: Sequence[Axis]) -> list[Point]:
    """Return every combination, the last axis fastest. Raises `ConfigError` for a bad value."""
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise ConfigError(f"--sweep: an axis is named twice in {', '.join(names)}")
    points = []
    for values in product(*(axis.values for axis in axes)):
        point = Point(values, spec)
        for name, value in zip(names, values, strict=True):
            point = _with(point, name, value)
        for role in ROLES:
            make_policy(point.spec.config.scheduler, role)  # a wrong name ends here
        points.append(point)
    return points


def run_point(point: Point, trace: list[TraceRequest], slo: Mapping[str, float]) -> Report:
    """Simulate one point."""
    return simulate(at_rate(trace, point.rate), point.spec, slo)


def at_rate(trace: list[TraceRequest], rate: float | None) -> list[TraceRequest]:
    """Return the trace with its gaps stretched so that `rate` requests come in a second."""
    span = trace[-1].arrival - trace[0].arrival
    if rate is None or span <= 0:
        return trace
    factor = (len(trace) - 1) / (rate * span)
    start = trace[0].arrival
    return [request._replace(arrival=(request.arrival - start) * factor) for request in trace]


def with_settings(config: TandemConfig, settings: Mapping[str, Any]) -> TandemConfig:
    """Return the configuration with settings by full name replaced. Raises `ConfigError`."""
    content = config.model_dump()
    for name, value in settings.items():
        *sections, field = name.split(".")
        place = content
        for section in sections:
            place = place.get(section, {})
        if field not in place:
            raise ConfigError(f"{name}: there is no such setting; see docs/configuration.md")
        place[field] = value
    try:
        return TandemConfig.model_validate(content)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise ConfigError(wrong) from error


def with_chunk(config: TandemConfig, tokens: Any) -> TandemConfig:
    """Return the configuration with chunks of so many tokens, and a budget that holds one."""
    chunked = with_settings(config, {"scheduler.chunk_size": tokens})
    scheduler = chunked.scheduler
    budget = max(scheduler.max_batch_tokens, scheduler.chunk_size)
    return with_settings(chunked, {"scheduler.max_batch_tokens": budget})


def with_policy(config: TandemConfig, names: str) -> TandemConfig:
    """Return the configuration with a policy of both roles, or of each: `prefill/decode`."""
    prefill, _, decode = names.partition("/")
    return with_settings(
        config,
        {
            "scheduler.policy": decode or prefill,
            "scheduler.prefill_policy": prefill if decode else "",
            "scheduler.decode_policy": "",
        },
    )


def parse_split(text: str) -> tuple[int, int]:
    """Read `P:D`, the numbers of prefill and decode workers. Raises `ConfigError`."""
    prefill, _, decode = text.partition(":")
    if not (prefill.isdigit() and decode.isdigit() and int(decode)):
        raise ConfigError(
            f"split = {text!r}: expected PREFILL:DECODE, such as 1:3; at least one decode worker, "
            "0 prefill workers for colocated serving"
        )
    return int(prefill), int(decode)


def _with(point: Point, name: str, value: str) -> Point:
    spec = point.spec
    if name == "rate":
        return replace(point, rate=_positive(name, value))
    if name == "split":
        prefill, decode = parse_split(value)
        return replace(point, spec=replace(spec, num_prefill=prefill, num_decode=decode))
    if name == "chunk":
        config = with_chunk(spec.config, value)
    elif name == "policy":
        config = with_policy(spec.config, value)
    else:
        config = with_settings(spec.config, {name: value})
    return replace(point, spec=replace(spec, config=config))


def _positive(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {text!r}: allowed: a number above 0")
    return value


def table(axes: Iterable[Axis], points: Sequence[Point], reports: Sequence[Report]) -> list[Row]:
    """Return a row per point: its values, then the figures that people compare, by name."""
    names = [axis.name for axis in axes]
    return [
        dict(zip(names, point.values, strict=True)) | figures(report, point.spec)
        for point, report in zip(points, reports, strict=True)
    ]


Row = dict[str, Any]


def figures(report: Report, spec: ClusterSpec) -> Row:
    """Return the figures of one run; latencies in seconds, shares in [0, 1]."""
    summary: dict[str, Any] = report.summary()
    workers = spec.num_prefill + spec.num_decode
    return {
        "workers": workers,
        "ttft_p50": summary["ttft"]["p50"],
        "ttft_p99": summary["ttft"]["p99"],
        "itl_p50": summary["itl"]["p50"],
        "itl_p99": summary["itl"]["p99"],
        "tpot_p99": summary["tpot"]["p99"],
        "slo_met": summary["slo_met"],
        "goodput": summary["goodput"],
        "goodput_per_worker": summary["goodput"] / workers,
        "prefill_busy": summary["pools"]["prefill"]["busy"],
        "decode_busy": summary["pools"]["decode"]["busy"],
        "decode_blocks_max": summary["pools"]["decode"]["blocks_max"],
        "link_busy": summary["link_busy"],
        "preemptions": summary["preemptions"],
        "refused": summary["refused"],
    }
