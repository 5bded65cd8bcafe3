"""Traces become workloads: read, rescaled, given prompts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import pytest
from benchmarks.workload import (
    Arrival,
    Mix,
    describe,
    plan_requests,
    read_trace,
    rescale,
    synthetic_trace,
)
from hypothesis import given
from hypothesis import strategies as st

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
2023-11-16 18:15:51.1805900,879,55
2023-11-16 18:16:01.6805900,91,16
"""
MIX = Mix(
    rate=2.0,
    length_factor=0.5,
    shared_fraction=0.5,
    system_prompt_tokens=32,
    vocabulary=(300, 400),
    max_model_len=512,
)
ARRIVALS = st.lists(
    st.builds(Arrival, st.floats(0, 1e4), st.integers(1, 10**4), st.integers(1, 1000)),
    min_size=2,
    max_size=30,
).map(lambda items: sorted(items, key=lambda item: item.at))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE, encoding="utf-8")
    return path


def test_an_excerpt_starts_at_zero(trace: Path) -> None:
    excerpt = read_trace(trace, count=3, skip=1)

    assert [arrival.at for arrival in excerpt] == pytest.approx([0.0, 0.5, 11.0])
    assert excerpt[0].prompt_tokens == 396
    assert excerpt[-1].output_tokens == 16


def test_a_trace_that_is_too_short_says_so(trace: Path) -> None:
    with pytest.raises(ValueError, match="3 requests wanted after 2, it has 2"):
        read_trace(trace, count=3, skip=2)


def test_rescaling_reaches_the_rate_and_keeps_the_bursts(trace: Path) -> None:
    scaled = rescale(read_trace(trace, 4), rate=0.5, length_factor=0.25)

    assert [arrival.at for arrival in scaled] == pytest.approx([0.0, 1.6, 1.8, 6.0])
    assert [arrival.prompt_tokens for arrival in scaled] == [94, 99, 220, 23]
    assert [arrival.output_tokens for arrival in scaled] == [11, 27, 14, 4]


@given(ARRIVALS, st.floats(0.01, 1000), st.floats(0.001, 2))
def test_rescaling_keeps_order_and_never_makes_an_empty_request(
    arrivals: list[Arrival], rate: float, factor: float
) -> None:
    scaled = rescale(arrivals, rate, factor)

    assert all(later.at >= earlier.at for earlier, later in pairwise(scaled))
    assert all(arrival.prompt_tokens and arrival.output_tokens for arrival in scaled)
    if arrivals[-1].at - arrivals[0].at > 1e-6:
        assert scaled[-1].at == pytest.approx((len(scaled) - 1) / rate)


def test_a_workload_is_the_same_every_time() -> None:
    arrivals = synthetic_trace(20)

    assert plan_requests(arrivals, MIX) == plan_requests(arrivals, MIX)


def test_shared_prompts_begin_alike_and_the_others_do_not() -> None:
    planned = plan_requests(synthetic_trace(200), MIX)
    beginnings = {request.prompt[:32] for request in planned if request.shared}
    others = {request.prompt[:32] for request in planned if not request.shared}

    assert len(beginnings) == 1
    assert not beginnings & others
    assert len({request.prompt for request in planned if request.shared}) > 50
    assert 0.3 < describe(planned)["shared_fraction"] < 0.6


@given(ARRIVALS)
def test_every_request_fits_the_context_and_the_vocabulary(arrivals: list[Arrival]) -> None:
    for request in plan_requests(arrivals, MIX):
        assert 1 <= len(request.prompt) <= MIX.max_model_len - request.max_tokens
        assert all(300 <= token < 400 for token in request.prompt)


def test_the_synthetic_mix_has_the_traces_statistics() -> None:
    """Means and medians of the Azure 2023 conversation trace, within a fifth."""
    arrivals = synthetic_trace(4000)
    prompts = [arrival.prompt_tokens for arrival in arrivals]
    outputs = [arrival.output_tokens for arrival in arrivals]
    gaps = [later.at - earlier.at for earlier, later in pairwise(arrivals)]

    assert fmean(prompts) == pytest.approx(1155, rel=0.2)
    assert fmean(outputs) == pytest.approx(211, rel=0.2)
    assert median(outputs) == pytest.approx(150, rel=0.2)
    assert fmean(gaps) == pytest.approx(1.0, rel=0.1)
