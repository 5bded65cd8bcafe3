"""Turns the figures of `make bench-peers` into tables, sentences and the pages that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.foreign import warning
from benchmarks.pages import DOCS, README, update_page
from benchmarks.peers.cases import MODELS, QWEN, Case, Ceilings, ModelCases
from benchmarks.peers.plot import draw_bars
from benchmarks.report import align

PERFORMANCE = DOCS / "performance.md"
PICTURE = DOCS / "images" / "performance" / "peers.svg"
TANDEM, ENGINE, CEILINGS = "tandem", "tandem-engine", "ceilings"
ABSENT = "–"
WEIGHT_BYTES, LAYER_PARAMETERS = 988e6, 357.9e6
"""Of the Qwen2.5-0.5B shape: all weights in bfloat16, and parameters outside the embedding."""

Rows = Mapping[str, Mapping[str, Any]]


def update_pages(results: Mapping[str, Any]) -> None:
    """Write every part of the pages that these figures are shown in."""
    parts = {}
    for cases in MODELS:
        if rows := results.get(cases.key):
            parts[f"peers {cases.key}"] = f"{render_table(cases, rows)}\n\n{footnote(rows)}"
    if machine := results.get("machine"):
        parts["peers machine"] = machine_sentence(machine)
    if rows := results.get(QWEN.key):
        update_page(README, {"peers headline": render_headline(rows)})
        draw_bars(PICTURE, _bars(rows))
    update_page(PERFORMANCE, parts)


def render_table(cases: ModelCases, rows: Rows) -> str:
    """Return tokens per second of every engine: median over its turns, range in parentheses.

    The best figure of a column is bold. Below: the machine's ceiling, and Tandem over the best
    peer beside what is aimed at.
    """
    engines = [key for key in rows if key != CEILINGS]
    best = {case.key: _best(rows, engines, case) for case in cases.cases}
    lines = [["tokens per second", *(case.title for case in cases.cases)]]
    for key in engines:
        row = rows[key]
        figures = [_cell(row, case, best[case.key]) for case in cases.cases]
        lines.append([f"{row['name']} ({row['how']})", *figures])
    if cases is QWEN and CEILINGS in rows:
        ceilings = _ceilings(rows[CEILINGS])
        bounds = [_bound(ceilings, case) for case in cases.cases]
        lines.append(["ceiling of the machine", *(_number(bound) for bound in bounds)])
    for key in (TANDEM, ENGINE):
        if key in rows:
            name = rows[key]["name"]
            lines.append([f"{name} / best peer", *(_ratio(rows, key, c) for c in cases.cases)])
    aims = [ABSENT if case.aim is None else f"≥ {case.aim:g}×" for case in cases.cases]
    lines.append(["aim", *aims])
    return align(lines)


def render_headline(rows: Rows) -> str:
    """Return the short table: Tandem, the best peer of each column by name, and the ratio."""
    lines = [["tokens per second", *(case.title for case in QWEN.cases)]]
    if TANDEM in rows:
        lines.append(["Tandem", *(_figure(rows[TANDEM], case) for case in QWEN.cases)])
    peers, named = _peers(rows), []
    for case in QWEN.cases:
        key = max(peers, key=lambda peer: _median(rows[peer], case) or 0.0, default=None)
        value = None if key is None else _median(rows[key], case)
        named.append(
            ABSENT if key is None or value is None else f"{_number(value)} ({rows[key]['name']})"
        )
    lines.append(["best of the others", *named])
    lines.append(["ratio", *(_ratio(rows, TANDEM, case) for case in QWEN.cases)])
    return align(lines)


def footnote(rows: Rows) -> str:
    """Say who is missing and why, when rows were taken, and how busy the machine was."""
    engines = [row for key, row in rows.items() if key != CEILINGS]
    lines = [
        f"- not measured: {row['name']}: {row['unavailable']}"
        for row in engines
        if "unavailable" in row
    ]
    measured = [row for row in engines if row["runs"]]
    dates = sorted({row["date"] for row in measured})
    runs = sorted({len(row["runs"]) for row in measured})
    foreign = max((run["foreign"] for row in measured for run in row["runs"]), default=0.0)
    load = max((run["load_average"] for row in measured for run in row["runs"]), default=0.0)
    lines.append(
        f"{warning(foreign)}Turns of each: {_range(runs)}; measured {_range(dates)}. Other "
        f"programs took at most {foreign:.0%} of the machine during a turn (load average before "
        f"it, the benchmark's own included, at most {load:.1f})."
    )
    return "\n\n".join(lines)


def machine_sentence(machine: Mapping[str, Any]) -> str:
    """Return one sentence on the machine, in general words."""
    return (
        f"{machine['cores']} vCPUs, {machine['cpu']}, {machine['memory_gib']:.0f} GiB; "
        f"Python {machine['python']}, torch {machine['versions']['torch']}; "
        f"Tandem at {machine['revision'] or 'an unknown revision'}, {machine['date']}."
    )


def _bars(rows: Rows) -> list[tuple[str, list[tuple[str, float, float, float, bool]]]]:
    """Return, per case, (name, median, low, high, whether it is ours) of what was measured."""
    groups = []
    for case in QWEN.cases:
        bars = [
            (row["name"], median(values), min(values), max(values), key.startswith(TANDEM))
            for key, row in rows.items()
            if key != CEILINGS and (values := _values(row, case))
        ]
        groups.append((case.title, bars))
    return groups


def _ceilings(row: Mapping[str, Any]) -> Ceilings:
    runs = row["runs"]
    return Ceilings(*(median(run[name] for run in runs) for name in ("read_bytes", "gemm_flops")))


def _bound(ceilings: Ceilings, case: Case) -> float:
    return ceilings.speed(case, WEIGHT_BYTES, LAYER_PARAMETERS)


def _peers(rows: Rows) -> list[str]:
    return [key for key in rows if key != CEILINGS and not key.startswith(TANDEM)]


def _best(rows: Rows, keys: Sequence[str], case: Case) -> float | None:
    values = [value for key in keys if (value := _median(rows[key], case)) is not None]
    return max(values, default=None)


def _ratio(rows: Rows, key: str, case: Case) -> str:
    ours = _median(rows[key], case) if key in rows else None
    theirs = _best(rows, _peers(rows), case)
    return ABSENT if ours is None or theirs is None else f"{ours / theirs:.2f}×"


def _cell(row: Mapping[str, Any], case: Case, best: float | None) -> str:
    text = _figure(row, case)
    return text if best is None or _median(row, case) != best else f"**{text}**"


def _figure(row: Mapping[str, Any], case: Case) -> str:
    values = _values(row, case)
    if not values:
        return ABSENT
    middle, low, high = (_number(value) for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _median(row: Mapping[str, Any], case: Case) -> float | None:
    values = _values(row, case)
    return median(values) if values else None


def _values(row: Mapping[str, Any], case: Case) -> list[float]:
    return [run[case.key] for run in row["runs"] if case.key in run]


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _range(values: Sequence[Any]) -> str:
    if not values:
        return ABSENT
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
