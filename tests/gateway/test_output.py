"""Tokens to text events: the same text, tokens and counts however tokens are grouped."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.sampling import SamplingParams
from tandem.gateway.interfaces import OutputEvent
from tandem.gateway.output import OutputAssembler, TextEvent
from tandem.gateway.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def session_tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


def assemble(
    tokenizer: Tokenizer, sampling: SamplingParams, groups: list[tuple[int, ...]], end: str
) -> list[TextEvent]:
    """Feed groups of tokens until the assembler says that it is over."""
    assembler = OutputAssembler(tokenizer, sampling, prompt_len=3)
    events = []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        stop = group[-1] if last and end == "stop" else None
        reason = ("stop" if end == "stop" else "length") if last else None
        events.append(assembler.feed(OutputEvent(group, (), None, reason, stop, 1)))
        if events[-1].finish_reason:
            break
    return events


@given(
    ids=st.lists(st.integers(0, 319), min_size=1, max_size=30),
    cuts=st.sets(st.integers(1, 29)),
    stops=st.lists(st.sampled_from(["a", "the", "\ufffd", " q", "xx"]), max_size=3),
    min_tokens=st.integers(0, 5),
    include=st.booleans(),
    end=st.sampled_from(["stop", "length"]),
)
def test_grouping_makes_no_difference(
    session_tokenizer: Tokenizer,
    ids: list[int],
    cuts: set[int],
    stops: list[str],
    min_tokens: int,
    include: bool,
    end: str,
) -> None:
    sampling = SamplingParams(
        max_tokens=99,
        min_tokens=min_tokens,
        stop=tuple(stops),
        include_stop_str_in_output=include,
    )
    borders = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    grouped = [tuple(ids[a:b]) for a, b in itertools.pairwise(borders)]
    results = []
    for groups in (grouped, [(token_id,) for token_id in ids]):
        events = assemble(session_tokenizer, sampling, groups, end)
        text = "".join(event.text for event in events)
        tokens = [token_id for event in events for token_id in event.token_ids]
        last = events[-1]
        results.append((text, tokens, last.finish_reason, last.stop_reason, last.usage))
        assert last.usage is not None
        assert last.usage.completion_tokens == len(tokens)
    assert results[0] == results[1]
    if not stops and end == "length":
        assert results[0][0] == session_tokenizer.decode(ids, continuation=True)


def test_the_end_of_sequence_is_no_stop_reason(session_tokenizer: Tokenizer) -> None:
    (event,) = assemble(session_tokenizer, SamplingParams(max_tokens=9), [(5, 1)], "stop")
    assert (event.finish_reason, event.stop_reason) == ("stop", None)
    assert event.token_ids == (5, 1)
    sampling = SamplingParams(max_tokens=9, stop_token_ids=(5,))
    (event,) = assemble(session_tokenizer, sampling, [(5,)], "stop")
    assert (event.stop_reason, event.text) == (5, "")


def test_a_stop_string_wins_over_the_workers_reason(session_tokenizer: Tokenizer) -> None:
    ids = session_tokenizer.encode("say fox", add_special_tokens=False)
    sampling = SamplingParams(max_tokens=len(ids), stop=("fox",))
    (event,) = assemble(session_tokenizer, sampling, [tuple(ids)], "length")
    assert (event.text, event.finish_reason, event.stop_reason) == ("say ", "stop", "fox")
