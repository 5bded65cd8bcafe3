"""Draws the bars of `make bench-peers`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import OURS, THEIRS, new_figure, save_figure

Bar = tuple[str, float, float, float, bool]
"""Name, median, low, high, whether it is ours."""


def draw_bars(path: Path, groups: Sequence[tuple[str, Sequence[Bar]]]) -> None:
    """Write one panel per case, a bar per engine with the range of its turns."""
    figure, axes = new_figure(1, len(groups), 3.2 * len(groups), 3.0)
    for column, (title, bars) in enumerate(groups):
        axis = axes[0][column]
        places = range(len(bars))
        values = [bar[1] for bar in bars]
        below = [middle - low for _, middle, low, _, _ in bars]
        above = [high - middle for _, middle, _, high, _ in bars]
        colours = [OURS[0] if ours else THEIRS[2] for *_, ours in bars]
        axis.barh(places, values, xerr=(below, above), color=colours, ecolor="#444444")
        axis.set_yticks(places, [bar[0] for bar in bars] if column == 0 else [])
        axis.invert_yaxis()
        axis.set_title(title)
        axis.set_xlabel("tokens per second")
    save_figure(figure, path)
