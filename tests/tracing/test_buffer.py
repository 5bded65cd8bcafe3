"""The ring of one process: off by default, bounded, and it stops by itself."""

from __future__ import annotations

import threading

import pytest

from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.tracing import buffer as module
from tandem.tracing.buffer import PieceRef, TraceBuffer

PIECE = PieceRef(1, 0, 16, 0, 2)


def plan() -> IterationPlan:
    request = Request("r", (1, 2, 3), 3, SamplingParams(max_tokens=4))
    return IterationPlan((ScheduledChunk(Sequence(request, 0), 0, 3),))


def everything(buffer: TraceBuffer) -> None:
    buffer.stage("r", "accepted")
    buffer.leg("r", 1)
    buffer.iteration(plan(), 1.0, 2.0)
    buffer.sent("d", PIECE, 1.0, 1.1, 1.2)
    buffer.landed("p", PIECE)


def test_nothing_is_recorded_until_it_is_asked_for() -> None:
    buffer = TraceBuffer("w")
    everything(buffer)
    assert buffer.events(0.0) == []
    buffer.record(60.0)
    everything(buffer)
    assert len(buffer.events(0.0)) == 5
    buffer.record(0.0)
    everything(buffer)
    assert len(buffer.events(0.0)) == 5


def test_the_ring_is_bounded_and_says_from_when_it_is_complete() -> None:
    buffer = TraceBuffer("w", capacity=10)
    buffer.record(60.0)
    buffer.stage("r", "accepted", at=buffer.since + 1.0)
    assert buffer.complete_from == buffer.since
    for number in range(100):
        buffer.stage("r", "accepted", at=buffer.since + number)
    kept = [event[0] for event in buffer.events(0.0)]
    assert kept == [buffer.since + number for number in range(90, 100)]
    assert buffer.complete_from == buffer.since + 90


def test_recording_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    buffer = TraceBuffer("w")
    buffer.record(5.0)
    buffer.record(2.0)  # who asks for less does not take from who asked for more
    now[0] = 104.0
    buffer.iteration(plan(), 103.0, 104.0)
    assert buffer.recording
    now[0] = 106.0
    buffer.iteration(plan(), 105.0, 106.0)
    assert not buffer.recording
    buffer.stage("r", "finished")
    assert len(buffer.events(0.0)) == 2


def test_what_the_configuration_asks_for_is_not_stopped() -> None:
    buffer = TraceBuffer("w", always=True)
    buffer.record(1.0)
    buffer.record(0.0)
    assert buffer.recording
    everything(buffer)
    assert len(buffer.events(0.0)) == 5


def test_reading_while_other_threads_record() -> None:
    buffer = TraceBuffer("w", capacity=1000)
    buffer.record(60.0)
    stopping = threading.Event()

    def write() -> None:
        while not stopping.is_set():
            buffer.stage("r", "accepted")

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        sizes = [len(buffer.events(0.0)) for _ in range(50)]
    finally:
        stopping.set()
        for writer in writers:
            writer.join()
    assert max(sizes) <= 1000


def test_a_decode_step_is_told_from_a_chunk_of_one_token() -> None:
    request = Request("r", (1, 2, 3), 3, SamplingParams(max_tokens=4))
    sequence = Sequence(request, 0)
    buffer = TraceBuffer("w")
    buffer.record(60.0)
    for start, length in ((2, 1), (3, 1), (0, 4)):
        buffer.iteration(IterationPlan((ScheduledChunk(sequence, start, length),)), 1.0, 2.0)
    assert [event[2][0].is_decode for event in buffer.events(0.0)] == [False, True, False]
