"""`name=number` lists, the form in which settings carry small tables."""

from __future__ import annotations

import math


def parse_pairs(text: str) -> dict[str, float]:
    """Return the table that `text` ("premium=-10, batch=10") spells, in its order.

    Raises `ValueError` naming the entry that is wrong.
    """
    pairs: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = (part.strip() for part in entry.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (separator and name and math.isfinite(number)) or name in pairs:
            raise ValueError(f"expected name=number, each name once, found {entry!r}")
        pairs[name] = number
    return pairs
