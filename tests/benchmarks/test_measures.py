"""The arithmetic: percentiles, TPOT, goodput, and what counts as a failure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from benchmarks.measures import (
    Objectives,
    RequestRecord,
    Spread,
    percentile,
    spread,
    summarize,
)
from hypothesis import given
from hypothesis import strategies as st

WIDE = Objectives(ttft=100, tpot=100)


def record(
    *token_times: float, sent_at: float = 0.0, expected: int = 0, **fields: int | str
) -> RequestRecord:
    return RequestRecord(
        index=0,
        scheduled_at=sent_at,
        sent_at=sent_at,
        token_times=token_times,
        expected_tokens=expected or len(token_times),
        **{"prompt_tokens": 10, **fields},  # type: ignore[arg-type]
    )


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
    st.floats(0, 100),
)
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_percentile_of_nothing_is_no_number() -> None:
    assert percentile([], 99) is None


def test_latencies_of_one_request() -> None:
    one = record(3.0, 3.5, 4.5, 4.5, sent_at=1.0)

    assert one.ttft == 2.0
    assert one.e2e == 3.5
    assert one.tpot == pytest.approx(0.5)  # (3.5 - 2.0) / (4 - 1)
    assert one.gaps == [0.5, 1.0, 0.0]


def test_a_single_token_has_no_tpot_and_keeps_its_objective() -> None:
    one = record(1.0)

    assert one.tpot is None
    assert one.meets(Objectives(ttft=1.0, tpot=0.001))


@pytest.mark.parametrize(
    ("objectives", "kept"),
    [
        (Objectives(ttft=2.0, tpot=0.5), True),
        (Objectives(ttft=1.9, tpot=0.5), False),
        (Objectives(ttft=2.0, tpot=0.4), False),
        (Objectives(ttft=2.0, tpot=0.5, gap=9.0), True),
        (Objectives(ttft=2.0, tpot=0.5, gap=0.1), False),
    ],
)
def test_a_request_must_keep_every_objective(objectives: Objectives, kept: bool) -> None:
    assert record(2.0, 2.5, 3.0).meets(objectives) is kept


@pytest.mark.parametrize(
    "broken",
    [
        record(1.0, 2.0, expected=3),
        record(1.0, 2.0, error="HTTP 500"),
        record(expected=2),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(broken: RequestRecord) -> None:
    figures = summarize([record(1.0, 2.0), broken], WIDE)

    assert not broken.meets(WIDE)
    assert figures["failures"] == 1
    assert figures["attainment"] == 0.5
    assert figures["ttft_p99"] == 1.0


def test_throughput_and_goodput_are_over_first_send_to_last_token() -> None:
    records = [
        record(3.0, 4.0, sent_at=2.0),
        record(9.0, 10.0, 12.0, sent_at=3.0),
    ]

    figures = summarize(records, Objectives(ttft=5.0, tpot=2.0))

    assert figures["duration"] == 10.0
    assert figures["output_tokens_per_second"] == pytest.approx(0.5)
    assert figures["goodput"] == pytest.approx(0.1)  # the second's TTFT is 6 s
    assert figures["ttft_mean"] == pytest.approx(3.5)
    assert figures["itl_max"] == 2.0


def test_prefix_hit_rate_weighs_tokens_not_requests() -> None:
    cold = record(1.0, prompt_tokens=90)
    hit = record(1.0, prompt_tokens=10, cached_tokens=10)

    assert summarize([cold, hit], WIDE)["prefix_hit_rate"] == pytest.approx(0.1)


def test_a_run_without_any_answer_has_no_latencies() -> None:
    figures = summarize([record(expected=1, error="cannot connect")], WIDE)

    assert figures["ttft_p50"] is None
    assert figures["goodput"] is None
    assert figures["failures"] == 1


def test_a_spread_leaves_out_runs_without_the_figure() -> None:
    runs: list[dict[str, float | None]] = [{"a": 3.0}, {"a": None}, {"a": 1.0}, {"a": 8.0}]

    assert spread(runs, "a") == Spread(median=3.0, low=1.0, high=8.0)
    assert spread(runs, "b") is None


def test_a_record_is_of_its_own_send() -> None:
    late = replace(record(5.0, sent_at=4.0), scheduled_at=1.0)

    assert late.ttft == 1.0
