"""Puts generated parts into pages that are otherwise written by hand.

A part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; only what is between
them is replaced.
"""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
README = DOCS.parent / "README.md"


def replace_part(text: str, name: str, content: str) -> str:
    """Return the page with the named part replaced. Raises `ValueError` without its markers."""
    begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page needs {begin!r} and after it {end!r}, once each")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def update_page(path: Path, parts: dict[str, str]) -> None:
    """Replace the named parts of a page that is on disk."""
    text = path.read_text(encoding="utf-8")
    for name, content in parts.items():
        text = replace_part(text, name, content)
    path.write_text(text, encoding="utf-8")
