"""`tandem trace`: what it refuses, in words, and what it makes of a cluster's answers."""

from __future__ import annotations

import json

import pytest

from tandem.commands.trace import json_lines, notes, parse_duration, targets_of
from tandem.core.errors import ConfigError, UnavailableError
from tandem.timeline.events import Iteration, Part, Stage, Timeline
from tandem.tracing.collect import Target
from tandem.tracing.merge import Recording
from tandem.v1 import cluster_pb2

from .conftest import Run


def test_without_a_cluster_it_says_what_to_do(run_tandem: Run, closed_port: int) -> None:
    result = run_tandem("trace", "--last", "1s", "--controller", f"127.0.0.1:{closed_port}")
    assert result.returncode == 1
    assert f"no Tandem controller answers at 127.0.0.1:{closed_port}" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


@pytest.mark.parametrize("text", ["", "soon", "-1s", "0s", "3 weeks", "2h", "90m", "1e3s"])
def test_a_wrong_duration_is_named_with_what_is_right(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a duration such as 30s"):
        parse_duration(text)


def test_durations() -> None:
    assert parse_duration("30s") == parse_duration("30") == parse_duration("0.5m") == 30.0
    assert parse_duration("500ms") == 0.5


def test_a_directory_that_is_missing_is_told_before_anything_is_recorded(run_tandem: Run) -> None:
    result = run_tandem("trace", "--timeline", "/no/such/place/out.html")
    assert result.returncode == 2
    assert "/no/such/place/out.html: the directory does not exist" in result.stderr


def test_it_asks_ready_workers_and_gateways_that_can_be_asked() -> None:
    status = cluster_pb2.ClusterStatus(
        workers=[
            cluster_pb2.WorkerStatus(name=name, role=role, state=state, address=f"127.0.0.1:{port}")
            for name, role, state, port in (
                ("decode-0", cluster_pb2.ROLE_DECODE, cluster_pb2.WORKER_STATE_READY, 1),
                ("decode-1", cluster_pb2.ROLE_DECODE, cluster_pb2.WORKER_STATE_DEAD, 2),
                ("prefill-0", cluster_pb2.ROLE_PREFILL, cluster_pb2.WORKER_STATE_READY, 3),
            )
        ],
        gateways=[
            cluster_pb2.GatewayStatus(gateway_id="gw-1", tracing_address="127.0.0.1:4"),
            cluster_pb2.GatewayStatus(gateway_id="gw-2"),
        ],
    )
    assert targets_of(status) == [
        Target("prefill-0", "127.0.0.1:3"),
        Target("decode-0", "127.0.0.1:1"),
        Target("gw-1", "127.0.0.1:4", is_gateway=True),
    ]
    with pytest.raises(UnavailableError, match="no worker is ready"):
        targets_of(cluster_pb2.ClusterStatus())


def test_every_event_is_a_line_of_json_in_order_of_time() -> None:
    timeline = Timeline(
        iterations=[Iteration("prefill-0", 2.0, 3.0, (Part("r", 0, 4),))],
        stages=[Stage("gateway", 1.0, "r", "received")],
    )
    first, second = map(json.loads, json_lines(timeline))
    assert first == {
        "event": "stage", "process": "gateway", "at": 1.0, "request": "r", "name": "received",
    }  # fmt: skip
    assert (second["event"], second["worker"]) == ("iteration", "prefill-0")
    assert second["parts"] == [{"request": "r", "start": 0, "length": 4, "is_decode": False}]


def test_what_a_reader_must_know_is_said() -> None:
    said = notes(
        [
            Recording("a", []),
            Recording("b", [], clock_offset=2.5, clock_error=0.0001),
            Recording("c", [], truncated=True),
        ]
    )
    assert said == [
        "b: its clock was 2.500000 s ahead, within 0.100 ms",
        "c: its oldest events gave way to newer ones",
    ]
