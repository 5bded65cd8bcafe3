"""Turns the figures of all runs into one table per model, and keeps them as files.

Pure but for `save`. The table is markdown, aligned so that it reads well in a terminal too.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measures import Spread, spread

Figures = dict[str, float | None]
Format = Callable[[float], str]


def _milliseconds(value: float) -> str:
    number = value * 1000
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def _percent(value: float) -> str:
    return f"{value * 100:.1f}" if value >= 0.01 or not value else f"{value * 100:.2f}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _count(value: float) -> str:
    return f"{value:.0f}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    name: str
    format: Format
    compared: bool = True
    """Whether the ratio of the two ways of serving means something."""


ROWS = (
    Row("TTFT p50, ms", "ttft_p50", _milliseconds),
    Row("TTFT p99, ms", "ttft_p99", _milliseconds),
    Row("ITL p50, ms", "itl_p50", _milliseconds),
    Row("ITL p99, ms", "itl_p99", _milliseconds),
    Row("TPOT p50, ms", "tpot_p50", _milliseconds),
    Row("TPOT p99, ms", "tpot_p99", _milliseconds),
    Row("Output tokens / s", "output_tokens_per_second", _number),
    Row("Goodput, requests / s", "goodput", _number),
    Row("Within objectives, %", "attainment", _percent, compared=False),
    Row("Exposed transfer, % of TTFT", "exposed_share", _percent, compared=False),
    Row("Prefix hit rate, %", "prefix_hit_rate", _percent, compared=False),
    Row("CPU used, % of all cores", "cpu_share", _percent, compared=False),
    Row("Failures", "failures", _count, compared=False),
)
ABSENT = "–"


def render_table(figures: Mapping[str, Sequence[Figures]]) -> str:
    """Return the table: a column per way of serving (median, range of its runs), then the ratio.

    `figures` maps each way of serving to the figures of its runs; the ratio is the first's median
    over the second's.
    """
    modes = list(figures)
    header = ["", *modes, f"{modes[0]} / {modes[1]}"]
    lines = [header]
    for row in ROWS:
        spreads = [spread(figures[mode], row.name) for mode in modes]
        lines.append([row.label, *(_cell(row, item) for item in spreads), _quotient(row, spreads)])
    return align(lines)


def _cell(row: Row, item: Spread | None) -> str:
    if item is None:
        return ABSENT
    low, high, middle = (row.format(value) for value in (item.low, item.high, item.median))
    return middle if low == high else f"{middle} ({low} to {high})"


def _quotient(row: Row, spreads: Sequence[Spread | None]) -> str:
    first, second = spreads[:2]
    if not row.compared or first is None or second is None or not second.median:
        return ABSENT
    return f"{first.median / second.median:.2f}×"


def align(lines: Sequence[Sequence[str]]) -> str:
    """Return markdown with columns of even width, figures to the right."""
    widths = [max(_width(line[column]) for line in lines) for column in range(len(lines[0]))]
    rendered = ["| " + " | ".join(_pad(line, widths)) + " |" for line in lines]
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([rendered[0], "|" + "|".join(rule) + "|", *rendered[1:]])


def _pad(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    pads = [" " * (width - _width(text)) for text, width in zip(line, widths, strict=True)]
    return [line[0] + pads[0], *(pad + text for pad, text in zip(pads[1:], line[1:], strict=True))]


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return one sentence on what the figures were measured on."""
    versions = ", ".join(f"{name} {text}" for name, text in machine["versions"].items())
    load = " ".join(f"{value:.2f}" for value in machine["load_average"])
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}, {versions}; {machine['date']}; "
        f"load average before the runs {load}."
    )


def save(directory: Path, markdown: str, raw: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write the tables and the raw results; returns both paths, named after the date."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = "".join(letter for letter in raw["machine"]["date"] if letter.isdigit())
    table, results = directory / f"{stem}.md", directory / f"{stem}.json"
    table.write_text(markdown + "\n", encoding="utf-8")
    results.write_text(json.dumps(raw, default=str), encoding="utf-8")
    return table, results
