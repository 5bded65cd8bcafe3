"""What pictures of the benchmarks have in common: a plain look that reads on light and dark pages.

matplotlib is imported only where something is drawn; it comes with the extra `bench`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS, THEIRS = ("#0b6e4f", "#2a9d8f", "#8ab17d", "#4a7fb5"), ("#b5483a", "#e08a5b", "#8d8d8d")
SETTINGS = {
    "svg.hashsalt": "tandem",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.facecolor": "white",
}


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes, always as a 2-d array."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(SETTINGS)
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
    )


def save_figure(figure: Any, path: Path) -> None:
    """Write an SVG that is the same for the same figures."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
