"""Where the time of requests goes: the steps from submission to decoding, of a timeline.

Two ways are followed. The *way in*: from `received` to the first prefill iteration. The
*hand-over*: from the end of the last chunk, with its last KV piece, to the first decode iteration.
A step is the time between two marks that follow each other on a way. A worker that is computing
makes a request wait by itself, so each way's total is also given without the time in which the
worker that it leads to was in an iteration.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tandem.timeline.events import Iteration, StageName, Timeline

WAY_IN: tuple[StageName, ...] = (
    "received", "tokenized", "routed", "submitted", "arrived", "accepted", "asked", "leg_arrived",
    "queued", "offered", "granted", "started",
)  # fmt: skip
SUBMIT_TOTAL = "submitted -> first prefill iteration"
HANDOVER_TOTAL = "last piece landed -> first decode iteration"
IDLE = ", but for running iterations"


class Step(NamedTuple):
    """One line of the breakdown."""

    name: str
    seconds: tuple[float, ...]
    """One per request, sorted."""

    def percentile(self, percent: float) -> float:
        """Nearest rank; NaN of nothing."""
        if not self.seconds:
            return math.nan
        rank = math.ceil(percent / 100 * len(self.seconds))
        return self.seconds[max(rank, 1) - 1]


@dataclass
class _Life:
    stages: dict[StageName, float] = field(default_factory=dict)
    chunks: list[Iteration] = field(default_factory=list)
    steps: list[Iteration] = field(default_factory=list)
    sent: float = 0.0
    landed: float = 0.0


def breakdown(timeline: Timeline) -> list[Step]:
    """Return the steps in the order in which most requests take them, then the totals."""
    lives = _lives(timeline)
    running: dict[str, list[Iteration]] = defaultdict(list)
    for box in sorted(timeline.iterations, key=lambda box: box.began):
        running[box.worker].append(box)
    found: dict[str, list[float]] = {}
    totals: dict[str, list[float]] = {}
    for life in lives:
        if life.chunks and "submitted" in life.stages:
            first = life.chunks[0]
            marks = [(life.stages[name], str(name)) for name in WAY_IN if name in life.stages]
            marks = sorted(mark for mark in marks if mark[0] <= first.began)
            _note_steps([*marks, (first.began, "first prefill iteration")], found)
            began = life.stages["submitted"]
            _note_total(SUBMIT_TOTAL, began, first, running[first.worker], totals)
        if life.chunks and life.steps and life.landed and "joined" in life.stages:
            first, joined = life.steps[0], life.stages["joined"]
            computed = life.chunks[-1].ended
            # Pieces leave as layers are done, so the last one may go before its iteration ends.
            sent = max(computed, life.sent)
            marks = [(computed, "last chunk computed"), (sent, "last piece sent")]
            marks += [(life.landed, "last piece landed"), (joined, "joined")]
            _note_steps([*marks, (first.began, "first decode iteration")], found)
            _note_total(HANDOVER_TOTAL, life.landed, first, running[first.worker], totals)
    return [Step(name, tuple(sorted(times))) for name, times in (found | totals).items()]


def _lives(timeline: Timeline) -> Iterable[_Life]:
    lives: dict[str, _Life] = defaultdict(_Life)
    for stage in sorted(timeline.stages, key=lambda stage: stage.at):
        lives[stage.request].stages.setdefault(stage.name, stage.at)
    for box in sorted(timeline.iterations, key=lambda box: box.began):
        for part in box.parts:
            life = lives[part.request]
            (life.steps if part.is_decode else life.chunks).append(box)
    for transfer in timeline.transfers:
        if transfer.request in lives and transfer.sent is not None:
            life = lives[transfer.request]
            if transfer.ended > life.landed:
                life.sent, life.landed = transfer.sent, transfer.ended
    return lives.values()


def _note_steps(marks: Sequence[tuple[float, str]], found: dict[str, list[float]]) -> None:
    for (began, here), (ended, there) in pairwise(marks):
        found.setdefault(f"{here} -> {there}", []).append(ended - began)


def _note_total(
    name: str, began: float, first: Iteration, running: list[Iteration],
    totals: dict[str, list[float]],
) -> None:  # fmt: skip
    whole = first.began - began
    totals.setdefault(name, []).append(whole)
    computing = _overlap(running, began, first.began)
    totals.setdefault(name + IDLE, []).append(whole - computing)


def _overlap(running: list[Iteration], began: float, ended: float) -> float:
    """Seconds of [began, ended] that lie in iterations, which follow each other."""
    at = max(0, bisect_left(running, began, key=lambda box: box.began) - 1)
    covered = 0.0
    for box in running[at:]:
        if box.began >= ended:
            break
        covered += max(0.0, min(box.ended, ended) - max(box.began, began))
    return covered
