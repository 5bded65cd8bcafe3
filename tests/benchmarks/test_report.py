"""Tables, counters and files: what a reader of the benchmark sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.machine import describe_machine
from benchmarks.report import ROWS, Figures, machine_line, render_table, save
from benchmarks.run import stage_figures
from benchmarks.scenario import MODES, bundled, quick, qwen
from benchmarks.scrape import parse_counters
from prometheus_client import generate_latest

from tandem.worker.metrics import WorkerMetrics


def cells(table: str, label: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_ways_of_serving_stand_side_by_side_with_their_ratio() -> None:
    split: list[Figures] = [{"ttft_p50": 0.1}, {"ttft_p50": 0.3}, {"ttft_p50": 0.2}]
    table = render_table({"disaggregated": split, "colocated": [{"ttft_p50": 0.4}]})

    assert cells(table, "TTFT p50") == ["200 (100 to 300)", "400", "0.50×"]
    assert [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")] == [
        "",
        "disaggregated",
        "colocated",
        "disaggregated / colocated",
    ]


def test_a_figure_that_is_not_there_is_a_dash_and_zero_is_zero() -> None:
    both: dict[str, list[Figures]] = {
        "disaggregated": [{"exposed_share": 0.031, "failures": 0.0}],
        "colocated": [{"exposed_share": None, "failures": 2.0}],
    }
    table = render_table(both)

    assert cells(table, "Exposed transfer") == ["3.1", "–", "–"]
    assert cells(table, "Failures") == ["0", "2", "–"]
    assert cells(table, "ITL p99") == ["–", "–", "–"]


def test_every_line_of_a_table_is_as_wide_as_the_others() -> None:
    figures: list[Figures] = [{row.name: 12.3456 for row in ROWS}, {row.name: 0 for row in ROWS}]
    lines = render_table({"disaggregated": figures, "colocated": figures}).splitlines()

    assert len(lines) == len(ROWS) + 2
    assert len({len(line) for line in lines}) == 1


def test_exposed_transfer_is_of_a_run_and_of_requests_that_were_handed_over() -> None:
    metrics = WorkerMetrics("decode-0", "decode")
    metrics.observe_stage("transfer_exposed", 10.0)
    before = parse_counters(exposition(metrics))
    for seconds in (0.01, 0.03):
        metrics.observe_stage("transfer_exposed", seconds)
    metrics.kv_bytes.inc(1000)
    run = parse_counters(exposition(metrics)).since(before)

    figures = stage_figures(run, ttft_mean=0.5)

    assert figures["handed_over"] == 2
    assert figures["exposed_mean"] == pytest.approx(0.02)
    assert figures["exposed_share"] == pytest.approx(0.04)
    assert figures["kv_bytes"] == 1000


def test_colocated_serving_has_no_exposed_share() -> None:
    counters = parse_counters(exposition(WorkerMetrics("decode-0", "decode")))

    assert stage_figures(counters, ttft_mean=0.5)["exposed_share"] is None


def exposition(metrics: WorkerMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def test_both_ways_of_serving_get_the_same_cores() -> None:
    for scenario in (bundled(), qwen(Path("/models/any"))):
        split, together = (scenario.config(mode) for mode in MODES)

        assert split.worker.disaggregated
        assert not together.worker.disaggregated
        workers = split.controller.prefill_workers + split.controller.decode_workers
        assert workers * split.worker.threads == together.worker.threads
        assert split.scheduler == together.scheduler
        assert split.cache == together.cache


def test_a_quick_run_is_short_enough_and_otherwise_the_same() -> None:
    short = quick(bundled())

    assert short.runs == 1
    assert short.requests / short.rate < 15
    assert short.objectives == bundled().objectives


def test_results_are_kept_as_markdown_and_json(tmp_path: Path) -> None:
    machine = describe_machine()
    table, results = save(tmp_path / "results", "| a |", {"machine": machine})

    assert table.read_text(encoding="utf-8") == "| a |\n"
    assert json.loads(results.read_text(encoding="utf-8"))["machine"]["cores"] == machine["cores"]
    assert f"{machine['cores']} cores" in machine_line(machine)
