"""The engine loop of a worker under the virtual clock: schedule, let time pass, hand out.

The counterpart of `worker/engine_loop.py` and `WorkerRuntime.iterate`; the decisions are the real
scheduler's.
"""

from __future__ import annotations

from typing import Protocol

from tandem.core.sequence import IterationPlan, Sequence
from tandem.scheduler import Scheduler
from tandem.scheduler.costs import work_of
from tandem.simulator.clock import Clock
from tandem.simulator.profile import IterationCost
from tandem.simulator.report import PoolUse
from tandem.timeline.events import Timeline

TICK_SECONDS = 0.05
"""How often a worker looks again when its policy lets requests wait for time to pass."""


class WorkerRole(Protocol):
    """What a prefill or decode worker does around an iteration."""

    def before_plan(self) -> None: ...

    def admitted(self, sequence: Sequence) -> None: ...

    def preempted(self, sequence: Sequence) -> None: ...

    def planned(self) -> None:
        """A plan is made; what still waits had no place in it."""

    def computed(self, plan: IterationPlan, began: float) -> None:
        """Chunks are computed as of now; `advance` has been called."""

    def sampled(self, sequence: Sequence) -> None: ...

    def ended(self) -> None:
        """Everything that came out of the iteration is handed out."""


class IterationLoop:
    """Runs iterations of one worker while there is something to do."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        cost: IterationCost,
        clock: Clock,
        use: PoolUse,
        recorder: Timeline | None,
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self._cost = cost
        self._clock = clock
        self._use = use
        self._recorder = recorder
        self.began = 0.0
        """When the iteration under way, or the last one, began."""
        self._busy = False
        self._ticking = False

    @property
    def is_busy(self) -> bool:
        """Whether an iteration is under way."""
        return self._busy

    def attach(self, role: WorkerRole) -> None:
        """Say who is told of what happens."""
        self._role = role

    def wake(self) -> None:
        """Start an iteration unless one is under way: something has changed."""
        if self._busy:
            return
        self._busy = True  # what happens while a plan is made is seen by the next round of it
        plan, scheduler, now = None, self.scheduler, self._clock.now
        while plan is None or (not plan.chunks and (plan.admitted or plan.preempted)):
            self._role.before_plan()
            plan = scheduler.schedule(now)
            for seq in plan.preempted:
                self._role.preempted(seq)
            for seq in plan.admitted:
                self._role.admitted(seq)
            self._role.planned()
        self._busy = bool(plan.chunks)
        self.began = now
        if plan.chunks:
            seconds = self._cost.seconds(work_of(plan.chunks))
            self._clock.after(seconds, self._end, plan, now)
        elif scheduler.waiting and not self._ticking:
            self._ticking = True
            self._clock.after(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self.wake()

    def _end(self, plan: IterationPlan, began: float) -> None:
        self._busy = False
        seconds = self._clock.now - began
        scheduler = self.scheduler
        self._use.count(scheduler.pool, plan.num_tokens, seconds)
        if self._recorder is not None:
            self._recorder.iteration(self.name, began, self._clock.now, plan)
        samplers = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        scheduler.measured(plan, seconds)
        scheduler.advance(plan)
        self._role.computed(plan, began)
        for seq in samplers:
            self._role.sampled(seq)
        self._role.ended()
        self.wake()
