"""Which KV heads a rank of a worker holds. Pure.

With more ranks than KV heads, several ranks hold the same head.
"""

from __future__ import annotations

from typing import NamedTuple


class HeadRange(NamedTuple):
    """KV heads [first, first + num_heads) of the whole model."""

    first: int
    num_heads: int

    def overlap(self, other: HeadRange) -> HeadRange | None:
        """The heads in both."""
        first = max(self.first, other.first)
        last = min(self.first + self.num_heads, other.first + other.num_heads)
        return HeadRange(first, last - first) if last > first else None


def heads_of(rank: int, size: int, num_kv_heads: int) -> HeadRange:
    """Return what rank `rank` of `size` holds; one of the two numbers divides the other."""
    return HeadRange(rank * num_kv_heads // size, max(1, num_kv_heads // size))
