"""Turns the figures of `make bench-cluster` into tables, sentences and the pages that show them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cluster.plot import draw_curves
from benchmarks.foreign import warning
from benchmarks.pages import DOCS, README, update_page
from benchmarks.report import align

PERFORMANCE = DOCS / "performance.md"
PICTURE = DOCS / "images" / "performance" / "cluster.svg"
ABSENT = "–"
HEADER = (
    "system (cores), rate",
    "TTFT p50 / p99 / max, s",
    "ITL p50 / p99 / max, ms",
    "meets SLO",
    "goodput, req/s",
)

Rows = Mapping[str, Mapping[str, Any]]


def update_pages(results: Mapping[str, Any]) -> None:
    """Write every part of the pages that these figures are shown in."""
    rows = results.get("systems")
    if not rows:
        return
    update_page(
        PERFORMANCE,
        {
            "cluster": "\n\n".join(
                (picture(PERFORMANCE), render_table(rows), footnote(rows, results["load"]))
            ),
            "interference": render_interference(results.get("interference", {})),
        },
    )
    headline = f"{picture(README)}\n\n{render_headline(rows)}"
    update_page(README, {"cluster headline": headline})
    draw_curves(PICTURE, rows, results["load"]["objectives"])


def picture(page: Path) -> str:
    """Return the line that shows the curves on `page`."""
    shown = PICTURE.relative_to(page.parent).as_posix()
    return f"![Latency and goodput over load, one curve per system]({shown})"


def render_table(rows: Rows) -> str:
    """Return one line per system and rate."""
    lines = [list(HEADER)]
    for row in rows.values():
        for rate, figures in row["rates"].items():
            name = f"{row['name']} ({row['cores']}), {rate}/s"
            lines.append([name, *_cells(figures)])
    return align(lines)


def render_headline(rows: Rows) -> str:
    """Return the lines of the highest rate."""
    highest = max((float(rate) for row in rows.values() for rate in row["rates"]), default=0.0)
    lines = [[f"at {highest:g} requests per second", *HEADER[1:]]]
    lines.extend(
        [f"{row['name']} ({row['cores']})", *_cells(figures)]
        for row in rows.values()
        if (figures := row["rates"].get(f"{highest:g}"))
    )
    return align(lines)


def render_interference(rows: Rows) -> str:
    """Return what eight streams on one core lose to prompts on the other: of each system the run
    with the middle ratio, and the range of ratios."""
    lines = [["8 streams", "alone p50, ms", "beside prefill p50, ms", "p99, ms", "ratio of p50"]]
    for row in rows.values():
        runs = row["runs"]
        middle = runs[len(runs) // 2]
        times = [middle[name] * 1000 for name in ("alone_p50", "busy_p50", "busy_p99")]
        ratios = f"{middle['ratio']:.2f}× ({runs[0]['ratio']:.2f} to {runs[-1]['ratio']:.2f})"
        lines.append([row["name"], *(f"{time:.1f}" for time in times), ratios])
    return align(lines) if rows else "Not measured yet."


def footnote(rows: Rows, load: Mapping[str, Any]) -> str:
    """Say how it was measured, who is missing and why, and how busy the machine was."""
    runs = [figures for row in rows.values() for figures in row["rates"].values()]
    limits = load["objectives"]
    foreign = max((run["foreign"] for run in runs), default=0.0)
    lag = max((run["client_lag_p99"] or 0.0 for run in runs), default=0.0)
    dates = sorted({row["date"] for row in rows.values()})
    lines = [
        f"- not measured, or not to the end: {row['name']}: {row['unavailable']}"
        for row in rows.values()
        if "unavailable" in row
    ]
    for row in rows.values():
        for rate, figures in row["rates"].items():
            if figures["failures"]:
                reasons = "; ".join(figures["errors"]) or "tokens are missing"
                lines.append(
                    f"- {row['name']}, {rate}/s: {figures['failures']:g} failed: {reasons}"
                )
    lines.append(
        f"{warning(foreign)}Requests arrive for {load['seconds']:g} s at each rate, once. SLO: "
        f"TTFT ≤ {limits['ttft']:g} s, mean TPOT ≤ {limits['tpot'] * 1000:g} ms, no gap over "
        f"{limits['gap'] * 1000:g} ms. The client runs at nice {load['client_niceness']} on the "
        f"same cores; its timers were late by at most {lag * 1000:.0f} ms (p99). Other programs "
        f"took at most {foreign:.0%} of the machine. Measured {' and '.join(dates)}."
    )
    return "\n".join([*lines[:-1], "", lines[-1]]).strip()


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [
        _joined(figures, ("ttft_p50", "ttft_p99", "ttft_max"), 1, 2),
        _joined(figures, ("itl_p50", "itl_p99", "itl_max"), 1000, 0),
        ABSENT if figures["attainment"] is None else f"{figures['attainment']:.0%}",
        ABSENT if figures["goodput"] is None else f"{figures['goodput']:.2f}",
    ]


def _joined(figures: Mapping[str, Any], names: tuple[str, ...], factor: float, places: int) -> str:
    values = [figures[name] for name in names]
    return " / ".join(
        ABSENT if value is None else f"{value * factor:,.{places}f}" for value in values
    )
