"""Pictures of a sweep: one panel per figure, as PNG and as a page of its own with the table.

matplotlib draws; it is installed with `pip install 'tandem-serve[plots]'` and imported on use.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.core.errors import ConfigError
from tandem.simulator.sweep import Axis, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (
    ("slo_met", "objectives met"),
    ("goodput_per_worker", "goodput per worker, requests/s"),
    ("ttft_p99", "TTFT p99, s"),
    ("itl_p99", "ITL p99, s"),
)
_LOGARITHMIC = ("ttft_p99", "itl_p99")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:system-ui,sans-serif;margin:16px}}svg{{max-width:100%;height:auto}}
table{{border-collapse:collapse;font-size:12px}}th,td{{padding:3px 7px;text-align:right}}
th{{position:sticky;top:0;background:#fff;border-bottom:2px solid #333;vertical-align:bottom}}
tr:nth-child(even){{background:#f4f4f4}}</style>
</head><body>{svg}{table}</body></html>
"""


def write_plots(stem: Path, title: str, axes: Sequence[Axis], rows: Sequence[Row]) -> list[Path]:
    """Write `stem`.png and `stem`.html; return both paths. Raises `ConfigError`."""
    figure = _draw(title, axes, rows)
    png, page = stem.with_suffix(".png"), stem.with_suffix(".html")
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    svg = drawing.getvalue()
    try:
        figure.savefig(png, dpi=120)
        text = _PAGE.format(title=escape(title), svg=svg[svg.index("<svg") :], table=_table(rows))
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--plot {stem}: cannot be written: {error}") from error
    return [png, page]


def _draw(title: str, axes: Sequence[Axis], rows: Sequence[Row]) -> Figure:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'tandem-serve[plots]'"
        ) from error
    matplotlib.rcParams["svg.hashsalt"] = "tandem"  # the same sweep gives the same bytes
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    across = next((axis for axis in axes if len(axis.values) > 1), axes[0])
    lines = [axis.name for axis in axes if axis is not across]
    panels = figure.subplots(2, 2)
    for panel, (name, label) in zip(panels.flat, _PANELS, strict=True):
        _panel(panel, name, across, lines, rows)
        panel.set_title(label, fontsize=10)
        panel.set_xlabel(across.name)
    if lines:
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _panel(panel: Axes, name: str, across: Axis, lines: list[str], rows: Sequence[Row]) -> None:
    """One figure over the first axis, a line for each combination of the others."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        label = ", ".join(f"{line} {row[line]}" for line in lines)
        groups.setdefault(label, []).append((row[across.name], row[name]))
    numeric = all(_is_number(value) for value in across.values)
    for label, points in groups.items():
        x = [float(at) if numeric else at for at, _ in points]
        panel.plot(x, [value for _, value in points], marker="o", markersize=4, label=label)
    if name in _LOGARITHMIC and any(row[name] > 0 for row in rows):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")  # the default sets formulas, which takes seconds
        values = [row[name] for row in rows if row[name] > 0]
        panel.yaxis.set_minor_formatter("{x:g}" if max(values) < 10 * min(values) else "")
    else:
        panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(shown(value))}</td>" for value in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shown(value: Any) -> str:
    """A figure as people read it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
