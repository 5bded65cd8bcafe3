"""The arithmetic of `make bench-prediction`: the same arrivals in both, and signed errors."""

from __future__ import annotations

import pytest
from benchmarks.measures import RequestRecord
from benchmarks.prediction import Comparison, mean_of, measured, predict, render
from benchmarks.run import LoadError
from benchmarks.scenario import bundled
from benchmarks.workload import PlannedRequest

from tandem.simulator import Profile

PROFILE = Profile.model_validate(
    {
        "name": "round",
        "source": "made up",
        "iteration": {"fixed": 0.010, "prompt_token": 0.001, "decode": 0.0, "context": 0.0},
        "rpc_seconds": 0.001,
        "gateway_seconds": 0.004,
        "num_blocks": 64,
        "max_model_len": 1000,
    }
)


def test_a_prediction_is_of_the_requests_that_are_sent() -> None:
    requests = [PlannedRequest(i, i * 1.0, tuple(range(20)), 5, shared=False) for i in range(3)]
    predicted = predict(bundled(), "colocated", PROFILE, requests)
    assert predicted["ttft_p50"] == pytest.approx(0.004 + 0.001 + 0.010 + 0.020 + 0.001)
    assert predicted["itl_p99"] == pytest.approx(0.010, rel=0.01)


def test_predictions_from_two_profiles_are_averaged() -> None:
    assert mean_of([{"ttft_p50": 1.0}, {"ttft_p50": 2.0}]) == {"ttft_p50": 1.5}


def test_errors_are_signed_and_a_failed_request_fails_the_comparison() -> None:
    record = RequestRecord(0, 0.0, 1.0, (1.5, 1.6, 1.7), 3, 20)
    figures = measured([record])
    assert figures["ttft_p50"] == pytest.approx(0.5)
    assert figures["itl_p99"] == pytest.approx(0.1)
    predicted = {name: 0.9 * value for name, value in figures.items()}
    compared = Comparison("colocated", 2.0, 1, figures, predicted)
    assert compared.error("ttft_p50") == pytest.approx(-0.1)
    assert "500.0 / 450.0 (-10%)" in render([compared])
    with pytest.raises(LoadError, match="1 requests failed: tokens are missing"):
        measured([RequestRecord(0, 0.0, 1.0, (1.5,), 3, 20)])
