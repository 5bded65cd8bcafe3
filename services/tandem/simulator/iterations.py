"""The engine loop of a worker under the virtual clock: schedule, let time pass, hand out.

The counterpart of `worker/engine_loop.py` and `WorkerRuntime.iterate`; the decisions are the real
scheduler's.
"""

from __future__ import annotations

from typing import Protocol

from tandem.core.sequence import IterationPlan, Sequence
from tandem.kvcache.host_tier import BlockCopy
from tandem.scheduler import Scheduler
from tandem.scheduler.costs import work_of
from tandem.simulator.clock import Clock
from tandem.simulator.profile import IterationCost
from tandem.simulator.report import PoolUse
from tandem.simulator.timeline import Recorder

TICK_SECONDS = 0.05
"""How often a worker looks again when its policy lets requests wait for time to pass."""


class WorkerRole(Protocol):
    """What a prefill or decode worker does around an iteration."""

    def before_plan(self) -> None: ...

    def admitted(self, sequence: Sequence) -> None: ...

    def preempted(self, sequence: Sequence) -> None: ...

    def computed(self, plan: IterationPlan, began: float) -> None:
        """Chunks are computed as of now; `advance` has been called."""

    def sampled(self, sequence: Sequence) -> None: ...

    def restored(self, sequence: Sequence) -> None:
        """KV of an admitted sequence is back from host memory."""


class IterationLoop:
    """Runs iterations of one worker while there is something to do."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        cost: IterationCost,
        clock: Clock,
        use: PoolUse,
        recorder: Recorder | None,
        copy_seconds_per_block: float = 0.0,
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self._cost = cost
        self._clock = clock
        self._use = use
        self._recorder = recorder
        self._copy_seconds_per_block = copy_seconds_per_block
        self._copies_end = 0.0
        self._busy = False
        self._ticking = False

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
            self._start_copies(now)
        self._busy = bool(plan.chunks)
        if plan.chunks:
            seconds = self._cost.seconds(work_of(plan.chunks))
            self._clock.after(seconds, self._end, plan, now)
        elif scheduler.waiting and not self._ticking:
            self._ticking = True
            self._clock.after(TICK_SECONDS, self._tick)

    def _start_copies(self, now: float) -> None:
        """Copies between the tiers run one after the other, beside the iterations."""
        for copy in self.scheduler.take_copies():
            seconds = len(copy.host_blocks) * self._copy_seconds_per_block
            self._copies_end = max(now, self._copies_end) + seconds
            self._clock.at(self._copies_end, self._copied, copy, seconds)

    def _copied(self, copy: BlockCopy, seconds: float) -> None:
        restored = self.scheduler.copied(copy, seconds)
        if restored is not None:
            self._role.restored(restored)
        self.wake()

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
        self.wake()
