"""Stop strings are found wherever the text is cut, and text goes out as early as it may."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.text.stop_strings import StopStringMatcher

SMALL = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Try every end in order; of the stops that end there take the longest."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            stop = max(here, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stops, include_stop=include)
    out = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        out += text
        if stop is not None:
            return out, stop
    return out + matcher.flush(), None


@given(text=SMALL, stops=STOPS, cuts=st.sets(st.integers(0, 30)), include=st.booleans())
def test_cuts_make_no_difference(
    text: str, stops: list[str], cuts: set[int], include: bool
) -> None:
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    assert run(pieces, stops, include) == reference(text, stops, include)


@given(text=SMALL, stops=STOPS)
def test_exactly_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopStringMatcher(stops)
    emitted = ""
    for position, character in enumerate(text, start=1):
        piece, stop = matcher.push(character)
        emitted += piece
        if stop is not None:
            return
        seen = text[:position]
        beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        held = max((len(part) for part in beginnings if seen.endswith(part)), default=0)
        assert emitted == seen[: position - held]


@pytest.mark.parametrize(("include", "expected"), [(False, "one "), (True, "one END")])
def test_the_stop_string_is_text_only_on_request(include: bool, expected: str) -> None:
    assert run(["one E", "N", "D two"], ["END"], include) == (expected, "END")


def test_without_stop_strings_text_passes_through() -> None:
    assert StopStringMatcher([]).push("anything") == ("anything", None)
