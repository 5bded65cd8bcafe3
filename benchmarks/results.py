"""Figures that pages are made from: kept as JSON in the repository, merged row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parent / "measured"

Results = dict[str, Any]
"""By group (a model, a kind of run), then by row (an engine): whatever was measured of it."""


def read_results(path: Path) -> Results:
    """Return what has been measured so far; empty where nothing has."""
    if not path.is_file():
        return {}
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def merge(stored: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> Results:
    """Return the stored results with the new rows in place of the old ones."""
    groups = dict.fromkeys([*stored, *new])
    return {group: {**stored.get(group, {}), **new.get(group, {})} for group in groups}


def write_results(path: Path, results: Results) -> None:
    """Write the results so that a change of one row is a small difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, sort_keys=False)
    path.write_text(text + "\n", encoding="utf-8")
