"""Draws the curves of `make bench-cluster`: latencies and goodput over load."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.figures import OURS, THEIRS, new_figure, save_figure

PANELS = (
    ("TTFT p50, s", "ttft_p50", 1.0, True),
    ("TTFT p99, s", "ttft_p99", 1.0, True),
    ("ITL p50, ms", "itl_p50", 1000.0, True),
    ("ITL p99, ms", "itl_p99", 1000.0, True),
    ("requests that meet the SLO, %", "attainment", 100.0, False),
    ("goodput, requests per second", "goodput", 1.0, False),
)
"""Title, name of the figure, factor, whether the axis is logarithmic."""


def draw_curves(
    path: Path, rows: Mapping[str, Mapping[str, Any]], objectives: Mapping[str, float]
) -> None:
    """Write one panel per figure, a curve per system."""
    figure, axes = new_figure(2, 3, 10.5, 5.6)
    limits = {"ttft_p99": objectives["ttft"], "itl_p99": objectives["gap"]}
    ours, theirs = cycle(OURS), cycle(THEIRS)
    colours = {key: next(ours if key.startswith("tandem") else theirs) for key in rows}
    for number, (title, name, factor, logarithmic) in enumerate(PANELS):
        axis = axes[number // 3][number % 3]
        for key, row in rows.items():
            points = sorted((float(rate), run[name]) for rate, run in row["rates"].items())
            shown = [(rate, value * factor) for rate, value in points if value is not None]
            if shown:
                style = "o-" if key.startswith("tandem") else "s--"
                axis.plot(*zip(*shown, strict=True), style, color=colours[key], label=row["name"])
        if logarithmic:
            axis.set_yscale("log")
        if name in limits:
            axis.axhline(limits[name] * factor, color="#999999", linewidth=1, linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("requests per second")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save_figure(figure, path)
