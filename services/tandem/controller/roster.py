"""Who is in the cluster and what is to be done about it: the controller's decisions.

Pure: events and the time come in, actions go out. No clock, no I/O, no Ray; `manager` feeds it.
Invariants: the membership version grows with every change of the members and never falls; an
incarnation that was ever burnt is never a member again; a slot is launched only when it is dead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["prefill", "decode"]
State = Literal["starting", "ready", "unresponsive", "dead"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a worker that finished starting is reached, and which life of it that is."""

    address: str
    metrics_address: str
    incarnation: int
    pid: int
    node: str
    device: str


@dataclass(frozen=True, slots=True)
class Member:
    """A worker that gateways may use."""

    name: str
    role: Role
    address: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a process for this slot."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the slot's process for good; it is replaced once it is gone."""

    name: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """Give a worker that woke up an incarnation greater than the burnt one."""

    name: str
    burnt: int


Action = Launch | Kill | Adopt


@dataclass(frozen=True, slots=True)
class RosterTimeouts:
    """Seconds."""

    worker_timeout: float
    replace_after: float
    first_backoff: float = 0.5
    max_backoff: float = 30.0
    stable_after: float = 60.0
    """A worker that was ready for this long is replaced without delay when it dies."""


@dataclass(slots=True)
class Slot:
    """One named place in a pool; processes come and go in it.

    ::

        dead --Launch--> starting --started--> ready --silent--> unresponsive --Kill--> dead
                            |                    ^                    |
                            +--failed--> dead    +------adopted-------+
    """

    name: str
    role: Role
    state: State = "dead"
    endpoint: Endpoint | None = None
    last_heard: float | None = None
    """When the process last answered; None until it has."""
    since: float = 0.0
    """When it entered its state."""
    launch_at: float | None = 0.0
    """When a dead slot is to be launched; None while its old process is still being killed."""
    restarts: int = 0
    failures: int = 0
    """Lives in a row that ended before they were stable."""
    found: bool = False
    """Its process was there before this controller was."""
    detail: str = ""
    fatal: bool = False
    """It cannot start as configured, whoever tries."""

    @property
    def incarnation(self) -> int:
        return self.endpoint.incarnation if self.endpoint else 0


class Roster:
    """The pools as slots, and the membership that follows from them."""

    def __init__(
        self, slots: Iterable[tuple[str, Role]], timeouts: RosterTimeouts, first_version: int = 0
    ) -> None:
        self._slots = {name: Slot(name, role) for name, role in slots}
        self._timeouts = timeouts
        self._burnt: dict[str, int] = {}
        self._last_tick: float | None = None
        self.version = first_version

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(self._slots.values())

    def slot(self, name: str) -> Slot:
        return self._slots[name]

    def members(self) -> tuple[Member, ...]:
        return tuple(
            Member(slot.name, slot.role, slot.endpoint.address, slot.endpoint.incarnation)
            for slot in self._slots.values()
            if slot.state == "ready" and slot.endpoint is not None
        )

    # -- what happens to a process ---------------------------------------------------------

    def found(self, name: str, now: float) -> None:
        """A living process of this slot was discovered; whether it answers is still to be seen."""
        slot = self._slots[name]
        self._enter(slot, "starting", now)
        slot.found, slot.last_heard, slot.detail = True, now, "found again, not yet heard"

    def progressed(self, name: str, detail: str, now: float) -> None:
        """A starting process said how far it is."""
        slot = self._slots[name]
        if slot.state == "starting":
            slot.last_heard, slot.detail = now, detail

    def started(self, name: str, endpoint: Endpoint, now: float) -> None:
        """The process serves. It becomes a member unless it had fallen silent meanwhile."""
        slot = self._slots[name]
        if slot.state != "starting":
            return
        silent = slot.found and self._silence(slot, now) > self._timeouts.worker_timeout
        slot.endpoint, slot.last_heard, slot.fatal = endpoint, now, False
        if silent:
            self._burn(slot, "was frozen when the controller found it", now)
            return
        slot.detail = ""
        self._enter(slot, "ready", now)

    def start_failed(self, name: str, cause: str, now: float, *, fatal: bool = False) -> None:
        """The process ended before it served."""
        slot = self._slots[name]
        if slot.state == "starting":
            slot.fatal = fatal
            self._bury(slot, cause, now)

    def died(self, name: str, cause: str, now: float) -> None:
        """The process is gone."""
        slot = self._slots[name]
        if slot.state == "dead":
            if slot.launch_at is None:
                slot.launch_at = now
            return
        self._bury(slot, cause, now)

    # -- what a process says ---------------------------------------------------------------

    def answered(self, name: str, incarnation: int, now: float) -> Adopt | None:
        """A probe was answered. Returns what a woken worker needs before it may serve again."""
        slot = self._slots[name]
        if slot.endpoint is None or slot.state not in ("ready", "unresponsive"):
            return None
        slot.last_heard = now
        burnt = self._burnt.get(name, 0)
        if incarnation <= burnt:
            if slot.state == "ready":
                self._burn(slot, "came back with a burnt incarnation", now)
            return Adopt(name, self._burnt[name])
        if slot.state == "unresponsive":
            self.adopted(name, incarnation, now)
        elif incarnation != slot.incarnation:
            self._take(slot, incarnation)
            self.version += 1
        return None

    def adopted(self, name: str, incarnation: int, now: float) -> None:
        """A woken worker took a new incarnation; a burnt one changes nothing."""
        slot = self._slots[name]
        if slot.state != "unresponsive" or incarnation <= self._burnt.get(name, 0):
            return
        self._take(slot, incarnation)
        slot.last_heard, slot.detail = now, ""
        self._enter(slot, "ready", now)

    # -- the passing of time ---------------------------------------------------------------

    def tick(self, now: float) -> list[Action]:
        """Return what has become due. Silence counts only while this controller was listening."""
        self._forgive_own_pause(now)
        actions: list[Action] = []
        for slot in self._slots.values():
            silence = self._silence(slot, now)
            if slot.state == "dead" and slot.launch_at is not None and now >= slot.launch_at:
                actions.append(self._launch(slot, now))
            elif slot.state == "ready" and silence > self._timeouts.worker_timeout:
                self._burn(slot, f"silent for {silence:.1f} s", now)
            elif (
                slot.state in ("starting", "unresponsive")
                and silence > self._timeouts.replace_after
            ):
                self._bury(slot, f"silent for {silence:.1f} s, killed", now)
                slot.launch_at = None
                actions.append(Kill(slot.name))
        return actions

    # -- inside ----------------------------------------------------------------------------

    def _silence(self, slot: Slot, now: float) -> float:
        return 0.0 if slot.last_heard is None else now - slot.last_heard

    def _forgive_own_pause(self, now: float) -> None:
        """If nobody called for long, the controller was frozen, not the workers."""
        pause = 0.0 if self._last_tick is None else now - self._last_tick
        self._last_tick = now
        if pause <= self._timeouts.worker_timeout / 2:
            return
        for slot in self._slots.values():
            if slot.last_heard is not None:
                slot.last_heard = min(now, slot.last_heard + pause)

    def _launch(self, slot: Slot, now: float) -> Launch:
        slot.endpoint, slot.last_heard, slot.launch_at, slot.found = None, None, None, False
        slot.detail = "waiting for a place and a process"
        self._enter(slot, "starting", now)
        return Launch(slot.name)

    def _burn(self, slot: Slot, cause: str, now: float) -> None:
        self._burnt[slot.name] = max(self._burnt.get(slot.name, 0), slot.incarnation)
        slot.detail = cause
        self._enter(slot, "unresponsive", now)

    def _bury(self, slot: Slot, cause: str, now: float) -> None:
        was_stable = slot.state == "ready" and now - slot.since >= self._timeouts.stable_after
        served = slot.endpoint is not None
        self._burnt[slot.name] = max(self._burnt.get(slot.name, 0), slot.incarnation)
        slot.failures = 0 if was_stable else slot.failures + 1
        slot.restarts += 1
        slot.detail = cause
        slot.launch_at = now + self._backoff(slot.failures, served=served)
        self._enter(slot, "dead", now)

    def _backoff(self, failures: int, *, served: bool) -> float:
        """The first death of a worker that had served is mended at once."""
        waits = failures - 1 if served else failures
        if waits <= 0:
            return 0.0
        wait = self._timeouts.first_backoff * 2.0 ** min(waits - 1, 32)
        return min(self._timeouts.max_backoff, wait)

    def _take(self, slot: Slot, incarnation: int) -> None:
        if slot.endpoint is None:
            return
        old = slot.endpoint
        slot.endpoint = Endpoint(
            old.address, old.metrics_address, incarnation, old.pid, old.node, old.device
        )

    def _enter(self, slot: Slot, state: State, now: float) -> None:
        if (slot.state == "ready") != (state == "ready"):
            self.version += 1
        slot.state, slot.since = state, now
