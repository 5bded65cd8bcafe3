"""What holds a worker's ranks together: their connection, who is let in, and who is missed."""

from __future__ import annotations

import socket
import threading

import pytest

from tandem.core.config import WorkerConfig
from tandem.v1 import ranks_pb2
from tandem.worker.channel import Channel, ChannelClosedError
from tandem.worker.ranks import WorkerRanks
from tandem.worker.written import Point, Ready, WrittenLayers


def pair() -> tuple[Channel, Channel]:
    server = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(server.getsockname())
    far, _ = server.accept()
    server.close()
    return Channel(near), Channel(far)


def test_messages_of_any_size_arrive_whole_and_in_order() -> None:
    near, far = pair()
    sizes = [0, 1, 70_000, 3_000_000]

    def send() -> None:
        for size in sizes:
            near.send(ranks_pb2.RankReport(failed=ranks_pb2.RankFailed(reason="x" * size)))
        near.close()

    sender = threading.Thread(target=send)
    sender.start()
    got = [ranks_pb2.RankReport.FromString(far.receive(20)) for _ in sizes]
    assert [len(report.failed.reason) for report in got] == sizes
    with pytest.raises(ChannelClosedError, match="ended"):
        far.receive(20)
    sender.join()


def test_silence_is_an_error() -> None:
    near, far = pair()
    with pytest.raises(ChannelClosedError, match="silent for"):
        far.receive(0.05)
    near.close()


def test_closing_wakes_who_waits() -> None:
    near, far = pair()
    closer = threading.Timer(0.05, far.close)
    closer.start()
    with pytest.raises(ChannelClosedError):
        near.receive(None)
    closer.join()


def test_a_stranger_is_refused() -> None:
    ranks = WorkerRanks("decode-0", 2, WorkerConfig())
    host, port, token = ranks.address
    joined = []

    def join() -> None:
        ranks._admit(Channel(ranks._listener.accept()[0]))
        ranks._admit(Channel(ranks._listener.accept()[0]))
        joined.extend(ranks._channels)

    waiting = threading.Thread(target=join)
    waiting.start()
    hello = ranks_pb2.RankHello(rank=1, token=b"guess")
    stranger = Channel(socket.create_connection((host, port)))
    stranger.send(ranks_pb2.RankReport(hello=hello))
    with pytest.raises(ChannelClosedError):
        stranger.receive(20)
    hello.token = token
    known = Channel(socket.create_connection((host, port)))
    known.send(ranks_pb2.RankReport(hello=hello))
    waiting.join(20)
    assert joined == [1]
    ranks.stop()
    assert ranks_pb2.RankCommand.FromString(known.receive(20)).HasField("stop")


def test_nothing_happens_before_its_layer_is_written_nor_out_of_order() -> None:
    written, seen = WrittenLayers(), []

    def note(name: str) -> None:
        def action(ready: Ready) -> None:
            seen.append(name)

        written.when(points[name], action)

    points = {
        "early": Point(0, 0),
        "first": Point(1, 1),
        "behind": Point(1, 0),
        "next": Point(2, 0),
    }
    for name in points:
        note(name)
    assert seen == ["early"]
    written.note(1, 0, None)
    assert seen == ["early"]
    written.note(1, 1, None)
    assert seen == ["early", "first", "behind"]
    written.note(1, 2, None)
    written.note(2, 0, None)
    assert seen == ["early", "first", "behind", "next"]
