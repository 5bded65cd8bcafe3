"""Iterations under way: the next one is launched before the last one's tokens are handed out.

::

    device        | iteration n      | iteration n + 1  | n + 2
    engine thread   plan n + 1, wait   hand out n,        hand out n + 1, ...
                                       plan n + 2, wait

Engine thread only. Who computes is the scheduler's decision; here is when. Without overlap, every
iteration is waited for as soon as it is launched.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple, Protocol

import structlog

from tandem.core.sequence import IterationPlan
from tandem.engine import IterationOutput, Launched
from tandem.worker.runtime import WorkerRuntime

log = structlog.get_logger(__name__)


class PipelineOwner(Protocol):
    """Who is told how iterations ended, in their order."""

    def computed(self, plan: IterationPlan, output: IterationOutput) -> None:
        """Its KV is in place; append the tokens of sequences that are still there."""

    def failed(self, plan: IterationPlan, error: Exception) -> None:
        """Nothing of it can be used: end its sequences."""


class _UnderWay(NamedTuple):
    plan: IterationPlan
    launched: Launched
    launched_at: float


class Pipeline:
    """At most two iterations: one that computes and one that waits for it."""

    def __init__(self, runtime: WorkerRuntime, owner: PipelineOwner) -> None:
        self._runtime = runtime
        self._owner = owner
        self._under_way: deque[_UnderWay] = deque()
        self._last_end = 0.0

    def run(self, plan: IterationPlan) -> int:
        """Launch a plan, if there is anything in it, and settle what must be before the next one
        is made. Returns how many iterations were settled."""
        launched = bool(plan.chunks) and self._launch(plan)
        runs_on = launched and self._runtime.overlaps and not self._runtime.scheduler.must_settle
        settled = 0
        while len(self._under_way) > int(runs_on):
            self._settle(self._under_way.popleft())
            settled += 1
        return settled

    def _launch(self, plan: IterationPlan) -> bool:
        now = time.monotonic()
        try:
            launched = self._runtime.engine.launch(plan)
        except Exception as error:
            self._fail(plan, error)
            return False
        self._runtime.scheduler.launch(plan)
        self._under_way.append(_UnderWay(plan, launched, now))
        return True

    def _settle(self, iteration: _UnderWay) -> None:
        """Wait for the end of the oldest iteration, and hand out what it computed.

        It began when the one before it ended, if that was after its launch.
        """
        plan, scheduler = iteration.plan, self._runtime.scheduler
        try:
            output = iteration.launched.result()
        except Exception as error:
            self._fail(plan, error)
            scheduler.advance(plan)
            return
        now = time.monotonic()
        began = max(iteration.launched_at, self._last_end)
        self._last_end = now
        scheduler.advance(plan)
        self._runtime.account(plan, began, now)
        self._owner.computed(plan, output)

    def _fail(self, plan: IterationPlan, error: Exception) -> None:
        name = self._runtime.name
        log.error("forward pass failed", worker=name, sequences=len(plan.chunks), exc_info=error)
        self._owner.failed(plan, error)
