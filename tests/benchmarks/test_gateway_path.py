"""The path benchmark: real processes, few tokens; and what it makes of times."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.gateway import Load, _added_seconds, measure, measure_requests
from benchmarks.replay import write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("gateways", [0, 1])
def test_every_token_of_every_stream_is_timed(model: Path, gateways: int, endpoint: str) -> None:
    figures = measure(Load(3, 50.0, gateways, endpoint, 0.4), model)
    assert 0 < figures["added_p50"] <= figures["added_p99"]
    assert 0 < figures["tokens_per_second"] < 200  # three streams at 50 a second, and a start
    assert figures["tokens_per_read"] >= 1


def test_tokens_read_together_are_timed_each_by_its_own_start() -> None:
    added = _added_seconds([1.0, 2.0, 3.0], [[(2.5, 2), (3.25, 1)], [(3.5, 3)]])
    assert added == pytest.approx([1.5, 0.5, 0.25, 2.5, 1.5, 0.5])


def test_whole_requests_are_timed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gateway.REQUESTS_ONE_BY_ONE", 5)
    assert measure_requests(Load(1, 0.0, 1, "completions", 0.0), model)["added_p50"] > 0
