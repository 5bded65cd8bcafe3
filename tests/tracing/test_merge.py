"""One timeline of several processes: names, clocks and the halves of transfers fit together."""

from __future__ import annotations

import pytest

from tandem.timeline.events import Part, Stage
from tandem.tracing.buffer import (
    IterationEvent,
    LandedEvent,
    LegEvent,
    PieceRef,
    SentEvent,
    StageEvent,
)
from tandem.tracing.collect import estimate_clock
from tandem.tracing.merge import Recording, merge, request_name
from tandem.tracing.messages import event_from_proto, event_to_proto
from tandem.v1 import tracing_pb2

PIECE = PieceRef(7, 16, 8, 2, 2)
EVENTS = [
    IterationEvent(1.0, 2.0, (Part("a~gw.0", 0, 16), Part("b~gw.1", 40, 1, True))),
    StageEvent(3.0, "a~gw.0", "joined"),
    LegEvent(4.0, "a~gw.0", 7),
    SentEvent(5.0, "decode-0", PIECE, 4.1, 4.2, 4.3),
    LandedEvent(6.0, "prefill-0", PIECE),
]


@pytest.mark.parametrize("event", EVENTS)
def test_events_travel_unchanged(event) -> None:  # type: ignore[no-untyped-def]
    message = tracing_pb2.TraceEvent.FromString(event_to_proto(event).SerializeToString())
    assert event_from_proto(message) == event


def test_what_a_newer_process_records_is_skipped() -> None:
    stage = tracing_pb2.TracedStage(request_id="r", name="teleported")
    assert event_from_proto(tracing_pb2.TraceEvent(stage=stage)) is None
    assert event_from_proto(tracing_pb2.TraceEvent(at=1.0)) is None


def test_both_halves_of_a_transfer_meet_on_one_clock() -> None:
    prefill = Recording("prefill-0", [EVENTS[0], EVENTS[3]], clock_offset=1.0)
    decode = Recording(
        "decode-0", [LegEvent(1.0, "a~gw.0", 7), LandedEvent(4.5, "prefill-0", PIECE)]
    )
    timeline = merge([prefill, decode])
    (kv,) = timeline.transfers
    assert (kv.sender, kv.receiver, kv.request) == ("prefill-0", "decode-0", "a")
    assert (kv.start, kv.length, kv.first_layer, kv.num_layers) == (16, 8, 2, 2)
    times = (kv.began, kv.packed, kv.announced, kv.sent, kv.ended)
    assert times == pytest.approx((3.1, 3.2, 3.3, 4.0, 4.5))
    (box,) = timeline.iterations
    assert (box.began, box.ended) == (0.0, 1.0)
    assert [part.request for part in box.parts] == ["a", "b"]


def test_kv_that_a_prefill_worker_fetches_belongs_to_the_sender_s_leg() -> None:
    decode = Recording(
        "decode-0", [LegEvent(1.0, "a", 7), SentEvent(5.0, "prefill-0", PIECE, 4, 4, 4)]
    )
    (kv,) = merge([decode]).transfers
    assert (kv.sender, kv.request) == ("decode-0", "a")
    unknown = Recording("decode-0", [SentEvent(5.0, "prefill-0", PIECE, 4, 4, 4)])
    assert merge([unknown]).transfers[0].request == "leg 7"


def test_a_gateway_and_the_workers_speak_of_the_same_request() -> None:
    gateway = Recording(
        "gw", [StageEvent(1.0, "x~y", "received"), StageEvent(2.0, "x~y~gw.0", "routed")]
    )
    assert request_name("x~y~gw.0") == "x~y"
    assert request_name("plain") == "plain"
    stages = merge([gateway]).stages
    assert stages[1] == Stage("gw", 2.0, "x~y", "routed")


def test_a_clock_is_moved_only_by_more_than_the_exchange_may_err() -> None:
    assert estimate_clock([(10.0, 10.004, 10.01), (20.0, 20.3, 21.0)]).offset == 0.0
    offset, error = estimate_clock([(10.0, 110.0, 10.4), (20.0, 120.051, 20.1)])
    assert offset == pytest.approx(100.001)
    assert error == pytest.approx(0.05)
