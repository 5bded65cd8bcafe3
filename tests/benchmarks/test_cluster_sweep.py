"""Arrivals, the interference of prefill with decode, and the tables of the sweep."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
from benchmarks.cluster.interference import (
    LONG_PROMPTS,
    STREAMS,
    all_began,
    compare,
    plan_long_prompts,
    plan_streams,
)
from benchmarks.cluster.page import footnote, render_headline, render_interference, render_table
from benchmarks.cluster.plan import Sweep, plan_arrivals, plan_warm_up, read_lengths
from benchmarks.cluster.run import main
from benchmarks.cluster.systems import SYSTEMS, tandem_config
from benchmarks.measures import RequestRecord
from benchmarks.peers.environments import UnavailableError

SWEEP = Sweep(rate=2.0, seconds=500.0)


def test_the_lengths_are_those_of_the_trace() -> None:
    lengths = read_lengths()

    assert len(lengths) == 1200
    assert fmean(prompt for prompt, _ in lengths) == pytest.approx(1155, rel=0.02)
    assert fmean(output for _, output in lengths) == pytest.approx(211, rel=0.02)


def test_every_system_gets_the_same_requests_and_every_seed_others() -> None:
    lengths = read_lengths()

    assert plan_arrivals(lengths, SWEEP) == plan_arrivals(lengths, SWEEP)
    other = Sweep(rate=2.0, seconds=500.0, seed=2)
    assert plan_arrivals(lengths, SWEEP) != plan_arrivals(lengths, other)


def test_arrivals_keep_rate_time_and_scaled_lengths() -> None:
    planned = plan_arrivals([(1000, 100), (40_000, 2)], SWEEP)

    assert len(planned) == pytest.approx(1000, rel=0.1)
    assert [request.index for request in planned] == list(range(len(planned)))
    assert sorted(request.at for request in planned) == [request.at for request in planned]
    assert 0 < planned[0].at < planned[-1].at < SWEEP.seconds
    assert {(len(request.prompt), request.max_tokens) for request in planned} == {
        (250, 25),
        (3000, 2),
    }
    assert all(min(r.prompt) >= 300 and max(r.prompt) < SWEEP.vocab_size for r in planned)


def test_the_warm_up_is_unlike_the_run() -> None:
    run = {request.prompt[:8] for request in plan_arrivals(read_lengths(), SWEEP)}

    assert all(request.prompt[:8] not in run for request in plan_warm_up(SWEEP))


def streams(start: float, gap: float, count: int = 20) -> list[RequestRecord]:
    times = tuple(start + gap * number for number in range(count))
    return [RequestRecord(i, 0.0, 0.0, times, count, 128) for i in range(STREAMS)]


def prompts(sent_at: float, end: float) -> list[RequestRecord]:
    return [
        RequestRecord(STREAMS + i, sent_at, sent_at, (end,), 1, 1500) for i in range(LONG_PROMPTS)
    ]


def test_gaps_count_only_while_prompts_are_computed() -> None:
    slower = (*(1.0 + 0.1 * n for n in range(5)), *(1.6 + 0.2 * n for n in range(5)))
    beside = [RequestRecord(i, 0.0, 0.0, slower, 10, 128) for i in range(STREAMS)]

    result = compare(streams(1.0, 0.1), [*beside, *prompts(sent_at=1.5, end=2.3)])

    assert result.alone_p50 == pytest.approx(0.1)
    assert result.busy_p50 == pytest.approx(0.2)
    assert result.ratio == pytest.approx(2.0)
    assert result.gaps == 3 * STREAMS


def test_streams_that_ended_before_the_prompts_came_say_nothing() -> None:
    with pytest.raises(ValueError, match="same time"):
        compare(streams(1.0, 0.1), [*streams(1.0, 0.1), *prompts(sent_at=9.0, end=10.0)])


def test_prompts_come_after_all_streams_began() -> None:
    planned = plan_streams(1000, "x") + plan_long_prompts(1000, all_began(streams(1.5, 0.1)), "y")

    assert [request.index for request in planned] == list(range(STREAMS + LONG_PROMPTS))
    assert {request.at for request in planned[STREAMS:]} == {1.5}
    assert len({request.prompt for request in planned}) == len(planned)


def figures(**changed: Any) -> dict[str, Any]:
    return {
        "ttft_p50": 0.5,
        "ttft_p99": 2.0,
        "ttft_max": 3.0,
        "itl_p50": 0.03,
        "itl_p99": 0.04,
        "itl_max": 1.5,
        "attainment": 0.9,
        "goodput": 0.35,
        "failures": 0.0,
        "foreign": 0.02,
        "errors": [],
        "client_lag_p99": 0.01,
        **changed,
    }


ROWS = {
    "a": {"name": "A", "cores": "1 + 1", "date": "2026-11-21", "rates": {"0.4": figures()}},
    "b": {
        "name": "B",
        "cores": "2",
        "date": "2026-11-21",
        "rates": {
            "0.4": figures(),
            "0.8": figures(itl_p50=None, failures=2.0, errors=["HTTP 500"]),
        },
        "unavailable": "it ended",
    },
}
LOAD = {
    "seconds": 60.0,
    "client_niceness": 19,
    "objectives": {"ttft": 4.0, "tpot": 0.12, "gap": 0.5},
}


def test_the_table_has_a_line_per_system_and_rate() -> None:
    table = render_table(ROWS).splitlines()

    assert len(table) == 2 + 3
    assert "0.50 / 2.00 / 3.00" in table[2]
    assert "30 / 40 / 1,500" in table[2]
    assert "– / 40 / 1,500" in table[4]
    assert len(render_headline(ROWS).splitlines()) == 2 + 1


def test_failures_and_missing_systems_are_told() -> None:
    note = footnote(ROWS, LOAD)

    assert "B: it ended" in note
    assert "B, 0.8/s: 2 failed: HTTP 500" in note
    assert "no gap over 500 ms" in note


def test_the_middle_of_several_runs_is_shown_with_their_range() -> None:
    runs = [
        {"alone_p50": 0.03, "busy_p50": 0.03 * ratio, "busy_p99": 0.2, "ratio": ratio}
        for ratio in (1.0, 1.2, 3.0)
    ]
    table = render_interference({"a": {"name": "A", "runs": runs, "foreign": 0.0}})

    assert "36.0" in table
    assert "1.20× (1.00 to 3.00)" in table
    assert render_interference({}) == "Not measured yet."


def test_all_systems_of_ours_have_a_valid_configuration(tmp_path: Any) -> None:
    config = tandem_config(tmp_path, {"worker": {"threads": 1}})

    assert config.worker.threads == 1
    assert config.model.dtype == "bfloat16"
    with pytest.raises(UnavailableError, match=r"worker\.no_such_setting"):
        tandem_config(tmp_path, {"worker": {"no_such_setting": 1}})
    assert len({system.key for system in SYSTEMS}) == len(SYSTEMS)


def test_a_name_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "tandem,nothing"])

    assert "nothing is none of" in capsys.readouterr().err
