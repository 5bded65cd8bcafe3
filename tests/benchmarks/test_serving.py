"""The command: which runs it makes in which order, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import serving
from benchmarks.launch import ClusterError
from benchmarks.load import ClientCost
from benchmarks.measures import RequestRecord, summarize
from benchmarks.run import RunResult
from benchmarks.scenario import Mode, Scenario, bundled
from benchmarks.scrape import Counters
from benchmarks.workload import PlannedRequest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"vocab_size": 512}', encoding="utf-8")
    return directory


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[Mode]:
    """The ways of serving that were measured, in order; nothing is started."""
    measured: list[Mode] = []

    def measure(
        scenario: Scenario, mode: Mode, requests: list[PlannedRequest], niceness: int
    ) -> RunResult:
        measured.append(mode)
        ttft = 0.1 if mode == "disaggregated" else 0.2
        records = [
            RequestRecord(
                index=request.index,
                scheduled_at=request.at,
                sent_at=request.at,
                token_times=tuple(request.at + ttft + i / 100 for i in range(request.max_tokens)),
                expected_tokens=request.max_tokens,
                prompt_tokens=len(request.prompt),
            )
            for request in requests
        ]
        figures = summarize(records, scenario.objectives)
        client = ClientCost(niceness, 0.1, 0.01, 0.0001, 0.002, 0.001)
        return RunResult(mode, figures, records, client, Counters({}), 5.0, 15, 0.01)

    monkeypatch.setattr(serving, "measure", measure)
    return measured


def test_runs_alternate_and_leave_a_table_and_raw_results(
    model: Path, modes: list[Mode], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    options = ["--model", "bundled", "--runs", "2", "--requests", "5", "--results", str(results)]

    status = serving.main(
        [*options, "--bundled-model", str(model), "--trace", str(tmp_path / "no")]
    )

    assert status == 0
    assert modes == ["disaggregated", "colocated"] * 2
    (table,), (raw,) = results.glob("*.md"), results.glob("*.json")
    printed = capsys.readouterr().out
    assert all(line in printed for line in table.read_text(encoding="utf-8").splitlines())
    assert "synthetic mix" in printed
    assert "0.50×" in printed
    (measured,) = json.loads(raw.read_text(encoding="utf-8"))["measured"]
    assert [run["mode"] for run in measured["runs"]] == modes
    assert len(measured["runs"][0]["records"]) == 5


def test_a_cluster_that_does_not_start_is_told_and_is_a_failure(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object) -> RunResult:
        raise ClusterError("tandem serve ended with 1:\nno such model")

    monkeypatch.setattr(serving, "measure", measure)
    results = tmp_path / "results"

    status = serving.main(["--quick", "--bundled-model", str(model), "--results", str(results)])

    assert status == 1
    assert "no such model" in capsys.readouterr().err
    assert not results.exists()


def test_a_workload_uses_the_models_own_vocabulary(model: Path) -> None:
    scenario = bundled(str(model))

    requests, _ = serving.plan_workload(scenario, model / "no-trace.csv")

    assert len(requests) == scenario.requests
    ids = {token for request in requests for token in request.prompt}
    assert min(ids) == serving.FIRST_TOKEN_ID
    assert max(ids) == 511
