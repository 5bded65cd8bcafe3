"""The steps of a hand-made request, to the millisecond."""

from __future__ import annotations

import math

import pytest

from tandem.timeline.breakdown import HANDOVER_TOTAL, IDLE, SUBMIT_TOTAL, Step, breakdown
from tandem.timeline.events import Iteration, Part, Stage, StageName, Timeline, Transfer


def timeline() -> Timeline:
    stages: list[tuple[StageName, float]] = [
        ("submitted", 0.000), ("arrived", 0.001), ("accepted", 0.003), ("granted", 0.004),
        ("asked", 0.006), ("started", 0.009), ("joined", 0.031),
    ]  # fmt: skip
    return Timeline(
        iterations=[
            Iteration("prefill-0", 0.005, 0.008, (Part("other", 0, 9),)),
            Iteration("prefill-0", 0.010, 0.020, (Part("r", 0, 16), Part("other", 9, 9))),
            Iteration("decode-0", 0.027, 0.032, (Part("old", 50, 1, True),)),
            Iteration("decode-0", 0.033, 0.034, (Part("r", 16, 1, True),)),
        ],
        transfers=[
            Transfer("prefill-0", "decode-0", "r", 0.015, 0.019, sent=0.018),
            Transfer("prefill-0", "decode-0", "r", 0.020, 0.030, sent=0.026),
        ],
        stages=[Stage("x", at, "r", name) for name, at in stages],
    )


def test_each_step_is_the_time_since_the_mark_before_it() -> None:
    steps = {step.name: step.seconds for step in breakdown(timeline())}
    assert steps.pop("submitted -> arrived") == pytest.approx((0.001,))
    assert steps.pop("arrived -> accepted") == pytest.approx((0.002,))
    assert steps.pop("accepted -> granted") == pytest.approx((0.001,))
    assert steps.pop("granted -> asked") == pytest.approx((0.002,))
    assert steps.pop("asked -> started") == pytest.approx((0.003,))
    assert steps.pop("started -> first prefill iteration") == pytest.approx((0.001,))
    assert steps.pop("last chunk computed -> last piece sent") == pytest.approx((0.006,))
    assert steps.pop("last piece sent -> last piece landed") == pytest.approx((0.004,))
    assert steps.pop("last piece landed -> joined") == pytest.approx((0.001,))
    assert steps.pop("joined -> first decode iteration") == pytest.approx((0.002,))
    assert steps.pop(SUBMIT_TOTAL) == pytest.approx((0.010,))
    assert steps.pop(SUBMIT_TOTAL + IDLE) == pytest.approx((0.007,)), "3 ms were another's chunk"
    assert steps.pop(HANDOVER_TOTAL) == pytest.approx((0.003,))
    assert steps.pop(HANDOVER_TOTAL + IDLE) == pytest.approx((0.001,)), "2 ms were another's step"
    assert not steps


def test_a_request_that_was_not_seen_from_the_start_is_not_counted() -> None:
    half = timeline()
    half.stages = [stage for stage in half.stages if stage.name == "started"]
    assert breakdown(half) == []
    assert breakdown(Timeline()) == []


def test_percentiles_are_nearest_ranks() -> None:
    step = Step("s", tuple(float(number) for number in range(1, 101)))
    assert (step.percentile(50), step.percentile(99), step.percentile(100)) == (50.0, 99.0, 100.0)
    assert math.isnan(Step("s", ()).percentile(50))
