"""Finds stop strings in text that arrives in pieces.

Invariant: what comes out does not depend on where the pieces are cut. Text is given out as soon as
it cannot be part of a stop string any more, and never before. The match is the one that ends first;
of two that end together, the longer one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Matched(NamedTuple):
    """Text that may go out now, and the stop string that was found, if one was."""

    text: str
    stop: str | None


class _Automaton:
    """Knuth-Morris-Pratt matcher of one string: `matched` characters of it end the text so far."""

    __slots__ = ("_borders", "matched", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._borders = _border_lengths(pattern)

    def feed(self, text: str) -> int | None:
        """Return where in `text` the first full match ends, or None."""
        pattern, matched, position = self.pattern, self.matched, 0
        while position < len(text):
            if matched == 0:
                position = text.find(pattern[0], position)
                if position < 0:
                    break
            while matched and pattern[matched] != text[position]:
                matched = self._borders[matched - 1]
            if pattern[matched] == text[position]:
                matched += 1
            position += 1
            if matched == len(pattern):
                return position
        self.matched = matched
        return None


class StopStringMatcher:
    """Watches one stream of text for any of several stop strings."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """`stops` are non-empty. With `include_stop` the match itself is part of the text."""
        self._automata = [_Automaton(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> Matched:
        """Take the next piece of text. After a match the matcher is spent."""
        if not self._automata:
            return Matched(text, None)
        ends = [(end, -len(automaton.pattern), automaton.pattern)
                for automaton in self._automata
                if (end := automaton.feed(text)) is not None]  # fmt: skip
        pending = self._held + text
        if ends:
            end, _, stop = min(ends)
            end += len(self._held)
            self._held = ""
            return Matched(pending[: end if self._include_stop else end - len(stop)], stop)
        hold = max(automaton.matched for automaton in self._automata)
        cut = len(pending) - hold
        self._held = pending[cut:]
        return Matched(pending[:cut], None)

    def flush(self) -> str:
        """Return the text that was held back: no more comes, so that it is no stop string."""
        held, self._held = self._held, ""
        return held


def _border_lengths(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
