"""The small parts of the dispatcher by themselves."""

from __future__ import annotations

import asyncio
import random

import pytest
from structlog.testing import capture_logs

from tandem.gateway.dispatch.connection import Backoff, Reconnection
from tandem.gateway.dispatch.suspects import Suspects
from tandem.gateway.dispatch.view import Member, membership_from_proto
from tandem.gateway.dispatch.watchdog import Watchdog
from tandem.v1 import cluster_pb2


class FakeTime:
    """An event loop's clock and timers, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.timers: list = []
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def time(self) -> float:
        return self.now

    def call_at(self, when, callback, *args):
        timer = [when, callback, args]
        self.timers.append(timer)
        self.cancel_of = timer
        handle = type(
            "Handle", (), {"cancel": lambda _: timer in self.timers and self.timers.remove(timer)}
        )
        return handle()

    def advance(self, seconds: float, *, standstill: bool = False) -> None:
        """Let time pass; a standstill runs nothing until its end."""
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer[0] <= end]:
            timer = min(due, key=lambda entry: entry[0])
            self.timers.remove(timer)
            self.now = end if standstill else timer[0]
            timer[1](*timer[2])
        self.now = end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return FakeTime(monkeypatch)


def test_silence_expires_once(clock: FakeTime) -> None:
    expired: list[str] = []
    dog = Watchdog(5.0, 60.0, expired.append)
    clock.advance(4.0)
    dog.heard()
    clock.advance(4.9)
    assert expired == []
    clock.advance(0.2)
    assert expired == ["silent for 5.0 s"]
    clock.advance(100)
    assert len(expired) == 1


def test_only_a_busy_peer_must_progress(clock: FakeTime) -> None:
    expired: list[str] = []
    dog = Watchdog(5.0, 8.0, expired.append)

    def beat(seconds: int) -> None:
        for _ in range(seconds):
            clock.advance(1.0)
            dog.heard()

    beat(30)
    dog.set_busy(True)
    beat(7)
    dog.progressed()
    beat(7)
    dog.set_busy(False)
    beat(20)
    dog.set_busy(True)
    beat(7)
    assert expired == []
    beat(2)
    assert expired == ["no iteration for 8.0 s"]


def test_who_stood_still_itself_blames_nobody(clock: FakeTime) -> None:
    expired: list[str] = []
    Watchdog(5.0, 60.0, expired.append)
    clock.advance(50.0, standstill=True)
    assert expired == []
    clock.advance(6.0)
    assert len(expired) == 1


def test_a_stopped_watchdog_is_silent(clock: FakeTime) -> None:
    expired: list[str] = []
    dog = Watchdog(5.0, 60.0, expired.append)
    dog.stop()
    dog.stop()
    clock.advance(100)
    assert expired == []


def test_backoff_grows_to_its_bound_and_starts_again() -> None:
    backoff = Backoff(random.Random(1), first=0.1, last=1.0)
    delays = [backoff.next() for _ in range(10)]
    bounds = [0.1, 0.2, 0.4, 0.8, *[1.0] * 6]
    assert all(bound / 2 <= delay <= bound for delay, bound in zip(delays, bounds, strict=True))
    assert len(set(delays)) == 10
    backoff.reset()
    assert backoff.next() <= 0.1


async def test_a_connection_is_tried_for_ever_and_only_changes_are_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lost, and why; another reason; back; quiet for a while, which is nothing wrong; lost."""
    outcomes = iter(["refused", "refused", ValueError("odd"), "up", "", "up", "gone", "gone"])
    delays: list[float] = []
    all_tried = asyncio.Event()
    connection = Reconnection(random.Random(1), "prefix cache", worker="p-0")

    async def connect() -> str:
        outcome = next(outcomes, None)
        if outcome is None:
            all_tried.set()
            return await asyncio.Future()
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == "up":
            connection.up(incarnation=7)
            return ""
        return outcome

    async def sleep(seconds: float) -> None:
        delays.append(seconds)

    monkeypatch.setattr("tandem.gateway.dispatch.connection.asyncio.sleep", sleep)
    with capture_logs() as logs:
        task = asyncio.create_task(connection.keep(connect))
        await all_tried.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    names = {"connection": "prefix cache", "worker": "p-0"}
    told = [line for line in logs if line["log_level"] != "error"]
    assert all(line.items() >= names.items() for line in logs)
    assert [(line["event"], line.get("detail")) for line in told] == [
        ("connection lost", "refused"),
        ("connection lost", "ValueError: odd"),
        ("connected", None),
        ("connection lost", "gone"),
    ]
    assert len(logs) == len(told) + 1, "the traceback of what was not expected"
    assert delays[2] > 0.2, "tries do not become rarer"
    assert delays[3] <= 0.1, "an answer does not shorten the next delay"


def test_suspicion_fades_and_is_void_for_another_incarnation() -> None:
    suspects = Suspects(3.0)
    one, two = Member("p-1", "a:1", 1), Member("p-2", "a:2", 1)
    suspects.add(one, now=10.0)
    suspects.add(two, now=11.0)
    assert suspects.current(12.0) == {"p-1", "p-2"}
    assert suspects.current(13.5) == {"p-2"}
    suspects.keep({"p-2": two})
    assert suspects.current(13.5) == {"p-2"}
    suspects.keep({"p-2": Member("p-2", "a:3", 2)})
    assert suspects.current(13.5) == set()


@pytest.mark.parametrize("disaggregated", [True, False])
def test_membership_by_role(disaggregated: bool) -> None:
    members = [
        cluster_pb2.Member(name="p", role=cluster_pb2.ROLE_PREFILL, address="h:1", incarnation=3),
        cluster_pb2.Member(name="d", role=cluster_pb2.ROLE_DECODE, address="h:2", incarnation=4),
        cluster_pb2.Member(name="x", address="h:3"),
    ]
    membership = membership_from_proto(
        cluster_pb2.Membership(members=members, disaggregated=disaggregated)
    )
    assert membership.decode == {"d": Member("d", "h:2", 4)}
    assert membership.prefill == ({"p": Member("p", "h:1", 3)} if disaggregated else {})
    assert membership.model is None
