"""The engine loop of a worker under the virtual clock: schedule, let time pass, hand out.

The counterpart of `worker/engine_loop.py` and `WorkerRuntime.iterate`; the decisions are the real
scheduler's. Stretches of equal decode steps (`scheduler.steady`) are leapt over: one event stands
for all of them. Whoever looks at the scheduler meanwhile finds it as of now, and whoever changes it
wakes the loop, which ends the leap with the iteration that is under way.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import Protocol

from tandem.core.sequence import IterationPlan, Sequence
from tandem.kvcache.host_tier import BlockCopy
from tandem.scheduler import Scheduler
from tandem.scheduler.costs import Work, work_of
from tandem.scheduler.steady import repeat, steady_steps
from tandem.simulator.clock import Clock
from tandem.simulator.machines import WorkerTime
from tandem.simulator.report import PoolUse
from tandem.timeline.events import Timeline

TICK_SECONDS = 0.05
"""How often a worker looks again when its policy lets requests wait for time to pass."""
LONGEST_LEAP = 64
"""Steps; so that little is computed in vain when a leap ends early."""
TOKEN = 0
"""What every simulated iteration draws."""


class WorkerRole(Protocol):
    """What a prefill or decode worker does around an iteration."""

    @property
    def is_steady(self) -> bool:
        """Whether decode steps may be leapt over: nobody has to be asked after each."""

    def before_plan(self) -> None: ...

    def admitted(self, sequence: Sequence) -> None: ...

    def preempted(self, sequence: Sequence) -> None: ...

    def planned(self) -> None:
        """A plan is made; what still waits had no place in it."""

    def computed(self, plan: IterationPlan, work: Work, began: float) -> None:
        """Chunks, `work` all together, are computed as of now; `advance` has been called."""

    def sampled(self, sequences: list[Sequence]) -> None:
        """Each of them drew a token."""

    def restored(self, sequence: Sequence) -> None:
        """KV of an admitted sequence is back from host memory."""

    def repeated(self, plan: IterationPlan, ends: list[float]) -> None:
        """Every sequence of a plan of decode steps drew a token at each of these times."""

    def ended(self) -> None:
        """Everything that came out of the iteration is handed out."""


class IterationLoop:
    """Runs iterations of one worker while there is something to do."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        time: WorkerTime,
        clock: Clock,
        use: PoolUse,
        recorder: Timeline | None,
        leaps: bool = True,
        copy_seconds_per_block: float = 0.0,
        *,
        learns: bool = True,
    ) -> None:
        """`leaps`: over equal decode steps, where it may. `learns`: what iterations cost; without,
        neither the policy nor lending nor preemption may ask for it."""
        self.name = name
        self._learns = learns
        self._scheduler = scheduler
        self._time = time
        self._clock = clock
        self._use = use
        self._recorder = recorder
        self._copy_seconds_per_block = copy_seconds_per_block
        self._copies_end = 0.0
        self.began = 0.0
        """When the iteration under way, or the last one, began."""
        self._busy = False
        self._ticking = False
        self._leaps = leaps and recorder is None and not time.depends_on_others
        self._plan = IterationPlan(())
        """Of the iteration under way."""
        self._work = Work()
        """What is in it."""
        self._ends: list[float] = []
        """When it ends, and when the equal ones after it do, if this is a leap."""
        self._leap = 0
        """Counts leaps, so that the end of one that was cut short is not taken for another's."""

    @property
    def is_busy(self) -> bool:
        """Whether an iteration is under way."""
        return self._busy

    def attach(self, role: WorkerRole) -> None:
        """Say who is told of what happens."""
        self._role = role

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler as of now. After changing anything in it, `wake` the loop."""
        if len(self._ends) > 1:
            self._settle()
        return self._scheduler

    def wake(self, *, cuts: bool = True) -> None:
        """Start an iteration, or let the one under way be the last of its leap: something has
        changed.

        `cuts` False: nothing that the iterations of a leap depend on.
        """
        if self._busy:
            if cuts and len(self._ends) > 1:
                self._cut()
            return
        self._busy = True  # what happens while a plan is made is seen by the next round of it
        plan, scheduler, now = None, self._scheduler, self._clock.now
        while plan is None or (not plan.chunks and (plan.admitted or plan.preempted)):
            self._role.before_plan()
            plan = scheduler.schedule(now)
            for seq in plan.preempted:
                self._role.preempted(seq)
            for seq in plan.admitted:
                self._role.admitted(seq)
            if scheduler.host_tier is not None:
                self._start_copies(now)
            self._role.planned()
        self._busy = bool(plan.chunks)
        if plan.chunks:
            self._begin(plan, now)
        elif scheduler.waiting and not self._ticking:
            self._ticking = True
            self._clock.after(TICK_SECONDS, self._tick)

    def _start_copies(self, now: float) -> None:
        """Copies between the tiers run one after the other, beside the iterations."""
        for copy in self._scheduler.take_copies():
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

    def _begin(self, plan: IterationPlan, now: float) -> None:
        """Let time pass until the end of an iteration, or of a leap that begins with it."""
        work = work_of(plan.chunks)
        end = now + self._time.begin(work)
        self._plan, self._work, self.began, self._ends = plan, work, now, [end]
        if self._leaps and self._role.is_steady and not work.prompt_tokens:
            steps = steady_steps(self._scheduler, plan, LONGEST_LEAP)
            if steps:
                self._ends = list(accumulate(self._time.ahead(steps, work), initial=end))
        self._clock.at(self._ends[-1], self._end, self._leap)

    def _settle(self) -> None:
        """Do what has ended of a leap; the iteration that is under way now becomes its first."""
        ends, role, now = self._ends, self._role, self._clock.now
        if ends[0] > now:
            return
        ended = min(bisect_right(ends, now), len(ends) - 1)
        plan, over = self._plan, ends[:ended]
        if self._learns:
            seconds = [end - start for start, end in pairwise((self.began, *over))]
            self._scheduler.measured_run(self._work, seconds)
        self._work = self._work.after_steps(ended)
        self._plan = repeat(self._scheduler, plan, ended, TOKEN)
        self._time.took(ended)
        lasted = over[-1] - self.began
        self._use.count(self._scheduler.pool, ended * len(plan.chunks), lasted, ended)
        self.began, self._ends = over[-1], ends[ended:]
        role.repeated(plan, over)

    def _cut(self) -> None:
        """End a leap with the iteration under way."""
        self._settle()
        if len(self._ends) > 1:
            del self._ends[1:]
            self._leap += 1
            self._clock.at(self._ends[0], self._end, self._leap)

    def _end(self, leap: int) -> None:
        """End the last iteration of a leap, or the only one."""
        if leap != self._leap:
            return
        if len(self._ends) > 1:
            self._settle()
        self._busy, self._ends = False, []
        self._leap += 1
        self._time.end()
        plan, began, scheduler = self._plan, self.began, self._scheduler
        seconds = self._clock.now - began
        work, num_tokens = self._work, self._work.prompt_tokens + self._work.decodes
        self._use.count(scheduler.pool, num_tokens, seconds, 1)
        if self._recorder is not None:
            self._recorder.iteration(self.name, began, self._clock.now, plan)
        samplers = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        if self._learns:
            scheduler.measured(work, seconds)
        scheduler.advance(plan)
        self._role.computed(plan, work, began)
        self._role.sampled(samplers)
        self._role.ended()
        self.wake()
