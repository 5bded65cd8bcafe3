"""Turns results into markdown. Knows rows of text and numbers; not what they mean."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any


def markdown(results: dict[str, dict[str, Any]], elapsed: float) -> str:
    """One summary, then a chapter per section."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"# GPU results, {date}", "", f"{elapsed:.0f} s in all.", ""]
    summary = [
        {
            "section": name,
            "status": result["status"],
            "seconds": f"{result['seconds']:.0f}",
            "failures": len(result.get("failures", [])),
        }
        for name, result in results.items()
    ]
    lines += _table(summary)
    for name, result in results.items():
        lines += ["", f"## {name.replace('_', ' ')}: {result['status']}", ""]
        lines += [f"- {note}" for note in result.get("notes", [])]
        lines += [f"- FAILED: {failure}" for failure in result.get("failures", [])]
        if result.get("rows"):
            lines += ["", *_table(result["rows"])]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value).replace("|", "/")
