"""The controller's decisions, without processes and without waiting."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.controller.roster import Adopt, Endpoint, Kill, Launch, Roster, RosterTimeouts

TIMEOUTS = RosterTimeouts(worker_timeout=5.0, replace_after=30.0)
NAMES = ("prefill-0", "decode-0")


def endpoint(incarnation: int) -> Endpoint:
    return Endpoint("127.0.0.1:1", "127.0.0.1:2", incarnation, 4242, "here", "cpu")


def roster_with_one_ready(incarnation: int = 10) -> Roster:
    roster = Roster([("decode-0", "decode")], TIMEOUTS)
    assert roster.tick(0.0) == [Launch("decode-0")]
    roster.started("decode-0", endpoint(incarnation), 0.0)
    return roster


def keep_ticking(
    roster: Roster, start: float, end: float, *, answers: bool = False
) -> list[object]:
    """Tick every second, as the manager would."""
    actions: list[object] = []
    now = start
    while now <= end:
        if answers:
            roster.answered("decode-0", roster.slot("decode-0").incarnation, now)
        actions += roster.tick(now)
        now += 1.0
    return actions


def test_a_worker_is_a_member_only_once_it_serves() -> None:
    roster = Roster([("decode-0", "decode")], TIMEOUTS)
    roster.tick(0.0)
    roster.progressed("decode-0", "loading weights 40%", 1.0)
    assert roster.members() == ()
    assert roster.slot("decode-0").detail == "loading weights 40%"
    version = roster.version
    roster.started("decode-0", endpoint(10), 2.0)
    assert [member.incarnation for member in roster.members()] == [10]
    assert roster.version > version
    assert roster.slot("decode-0").detail == ""


def test_answers_keep_a_worker_and_leave_the_version_alone() -> None:
    roster = roster_with_one_ready()
    version = roster.version
    assert keep_ticking(roster, 1.0, 60.0, answers=True) == []
    assert roster.version == version


def test_silence_burns_the_incarnation_and_a_waking_worker_is_adopted() -> None:
    roster = roster_with_one_ready(10)
    version = roster.version
    keep_ticking(roster, 1.0, 6.0)
    assert roster.slot("decode-0").state == "unresponsive"
    assert roster.members() == ()
    assert roster.version > version
    assert roster.answered("decode-0", 10, 7.0) == Adopt("decode-0", burnt=10)
    assert roster.members() == ()
    roster.adopted("decode-0", 11, 7.5)
    assert [member.incarnation for member in roster.members()] == [11]


def test_an_adoption_whose_answer_was_lost_is_noticed_at_the_next_probe() -> None:
    roster = roster_with_one_ready(10)
    keep_ticking(roster, 1.0, 6.0)
    assert roster.answered("decode-0", 12, 7.0) is None
    assert [member.incarnation for member in roster.members()] == [12]


def test_a_burnt_incarnation_is_not_adopted() -> None:
    roster = roster_with_one_ready(10)
    keep_ticking(roster, 1.0, 6.0)
    roster.adopted("decode-0", 10, 7.0)
    assert roster.members() == ()


def test_long_silence_kills_and_the_slot_waits_for_the_process_to_go() -> None:
    roster = roster_with_one_ready()
    actions = keep_ticking(roster, 1.0, 100.0)
    assert actions == [Kill("decode-0")]
    roster.died("decode-0", "killed", 101.0)
    assert roster.tick(101.0) == [Launch("decode-0")]
    assert roster.slot("decode-0").restarts == 1


def test_a_death_is_mended_at_once_and_a_crash_loop_with_growing_delay() -> None:
    roster = roster_with_one_ready()
    roster.died("decode-0", "killed", 1.0)
    assert roster.tick(1.0) == [Launch("decode-0")]
    delays = []
    now = 1.0
    for _ in range(10):
        roster.start_failed("decode-0", "no memory", now)
        launch_at = roster.slot("decode-0").launch_at
        assert launch_at is not None
        delays.append(launch_at - now)
        now = launch_at
        assert roster.tick(now) == [Launch("decode-0")]
    assert delays == sorted(delays)
    assert delays[0] > 0
    assert delays[-1] == TIMEOUTS.max_backoff
    assert roster.slot("decode-0").restarts == 11


def test_the_cause_of_a_failed_start_is_kept_until_the_next_life() -> None:
    roster = Roster([("decode-0", "decode")], TIMEOUTS)
    roster.tick(0.0)
    roster.start_failed("decode-0", "architecture 'X' is not supported", 1.0, fatal=True)
    slot = roster.slot("decode-0")
    assert (slot.state, slot.detail, slot.fatal) == (
        "dead",
        "architecture 'X' is not supported",
        True,
    )


def test_a_worker_that_starts_slowly_is_not_killed_before_it_was_ever_heard() -> None:
    roster = Roster([("decode-0", "decode")], TIMEOUTS)
    assert keep_ticking(roster, 0.0, 300.0) == [Launch("decode-0")]


def test_a_worker_that_freezes_while_starting_is_replaced() -> None:
    roster = Roster([("decode-0", "decode")], TIMEOUTS)
    roster.tick(0.0)
    roster.progressed("decode-0", "loading weights", 1.0)
    assert keep_ticking(roster, 1.0, 40.0) == [Kill("decode-0")]


def test_workers_are_not_blamed_for_a_pause_of_the_controller_itself() -> None:
    roster = roster_with_one_ready()
    keep_ticking(roster, 1.0, 3.0, answers=True)
    assert roster.tick(1000.0) == []
    assert roster.slot("decode-0").state == "ready"
    keep_ticking(roster, 1001.0, 1007.0)
    assert roster.slot("decode-0").state == "unresponsive"


def test_a_found_worker_keeps_its_incarnation_if_it_answers_at_once() -> None:
    roster = Roster([("decode-0", "decode")], TIMEOUTS)
    roster.found("decode-0", 0.0)
    roster.started("decode-0", endpoint(10), 1.0)
    assert [member.incarnation for member in roster.members()] == [10]
    assert roster.tick(1.0) == []


def test_a_found_worker_that_was_frozen_is_adopted_before_it_serves() -> None:
    """It may have been burnt by the controller that died."""
    roster = Roster([("decode-0", "decode")], TIMEOUTS)
    roster.found("decode-0", 0.0)
    keep_ticking(roster, 0.0, 8.0)
    roster.started("decode-0", endpoint(10), 8.0)
    assert roster.members() == ()
    assert roster.answered("decode-0", 10, 8.1) == Adopt("decode-0", burnt=10)


class RosterMachine(RuleBasedStateMachine):
    """Any order of events, stale and repeated ones included, against the invariants."""

    def __init__(self) -> None:
        super().__init__()
        self.roster = Roster([("prefill-0", "prefill"), ("decode-0", "decode")], TIMEOUTS)
        self.now = 0.0
        self.next_incarnation = 1
        self.versions = [0]
        self.burnt: dict[str, set[int]] = {name: set() for name in NAMES}
        self.member_before: dict[str, int] = {}
        self.launched_and_not_dead: set[str] = set()

    def fresh(self) -> int:
        self.next_incarnation += 1
        return self.next_incarnation

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 4.0, 40.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        for action in self.roster.tick(self.now):
            if isinstance(action, Launch):
                assert action.name not in self.launched_and_not_dead, "two processes in one slot"
                self.launched_and_not_dead.add(action.name)

    @rule(name=st.sampled_from(NAMES))
    def start(self, name: str) -> None:
        self.roster.started(name, endpoint(self.fresh()), self.now)

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 3))
    def answer(self, name: str, back: int) -> None:
        self.roster.answered(name, max(1, self.next_incarnation - back), self.now)

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 3))
    def adopt(self, name: str, back: int) -> None:
        self.roster.adopted(name, max(1, self.next_incarnation - back), self.now)

    @precondition(lambda self: bool(self.launched_and_not_dead))
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.launched_and_not_dead)))
        self.launched_and_not_dead.discard(name)
        self.roster.died(name, "killed", self.now)

    @rule(name=st.sampled_from(NAMES))
    def progress(self, name: str) -> None:
        self.roster.progressed(name, "loading", self.now)

    @invariant()
    def the_version_tells_every_change(self) -> None:
        members = {member.name: member.incarnation for member in self.roster.members()}
        assert self.roster.version >= self.versions[-1]
        if members != self.member_before:
            assert self.roster.version > self.versions[-1]
        self.versions.append(self.roster.version)
        for name, incarnation in self.member_before.items():
            if name not in members:
                self.burnt[name].add(incarnation)
        self.member_before = members

    @invariant()
    def no_burnt_incarnation_is_a_member(self) -> None:
        for member in self.roster.members():
            assert member.incarnation not in self.burnt[member.name]


RosterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRosterMachine = RosterMachine.TestCase
