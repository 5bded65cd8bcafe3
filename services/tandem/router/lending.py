"""Whether a prompt is computed where it is, or sooner on a worker that has slack. Pure arithmetic.

Every worker says what its iterations cost and what they are busy with (`WorkerLoad`); from that
follows when the last token of each prompt would be computed in either place. A prompt moves when
that is sooner elsewhere by a clear margin, and only so many times. Nobody here sends anything or
reads a clock; the decode worker, who owns the requests, asks at every event that changes the
answer, and so does the simulator's: what may move or be kept is said here, once for both.

Invariant: a move that is advised ends sooner by the figures given, so none is undone by asking
again without news.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Literal, NamedTuple, TypeVar

from tandem.core.config import LendingConfig, TandemConfig
from tandem.core.sequence import Sequence
from tandem.scheduler import Scheduler
from tandem.scheduler.costs import IterationCosts, Work
from tandem.scheduler.prompt_room import MIN_ROOM, running_work

Key = TypeVar("Key")
LegPhase = Literal["asked", "offered", "kept", "granted", "cutting", "over"]
"""Of a prompt that a prefill worker computes, as its decode worker knows it."""
MOST_PROMPTS = 128
"""Prompts that are looked at in one decision: bounds its time however long the queues are."""


class PromptWork(NamedTuple):
    """Prompt tokens to compute, and the (token, earlier token) pairs in them."""

    tokens: int = 0
    attended: int = 0

    def plus(self, start: int, end: int) -> PromptWork:
        """This work and that of tokens [start, end) of a prompt."""
        length = max(0, end - start)
        attended = length * start + length * length // 2
        return PromptWork(self.tokens + length, self.attended + attended)

    def exchanging(self, old: PromptWork, new: PromptWork) -> PromptWork:
        """This work with `new` in the place of `old`, a part of it."""
        return PromptWork(
            self.tokens - old.tokens + new.tokens, self.attended - old.attended + new.attended
        )


NO_WORK = Work()
NO_PROMPTS = PromptWork()


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What one worker is busy with, and what its work costs it."""

    costs: IterationCosts
    budget: int
    """Most tokens of one of its iterations."""
    running: Work = NO_WORK
    """The sequences that decode there, in every iteration beside prompts."""
    longest_iteration: float = math.inf
    """Seconds that an iteration may take while sequences decode: their ITL objective."""
    queued: PromptWork = NO_PROMPTS
    """Prompts ahead of any that is asked about."""
    credit: float = 0.0
    """Seconds that have gone by since its last sign of progress."""
    free_blocks: int = 0


class Prompt(NamedTuple, Generic[Key]):
    """A prompt that the decode worker or one prefill worker computes.

    Tokens before `start` are in place wherever it goes.
    """

    key: Key
    start: int
    end: int
    target: str
    """The prefill worker that the router named for it; empty: none, it stays."""
    is_here: bool
    """Whether the decode worker computes it now, or is to; else its target."""
    may_move: bool = True
    blocks: int = 0
    """KV blocks that the decode worker would have to find for it."""


class Move(NamedTuple, Generic[Key]):
    """Advice: compute the rest of a prompt in its other place."""

    key: Key
    gain: float
    """Seconds by which its last prompt token is computed sooner."""


def prefill_seconds(load: WorkerLoad, prompts: PromptWork) -> float:
    """Return how long a worker takes over prompts, beside the sequences that decode there."""
    return _Line(load).seconds(prompts)


def prompt_token_seconds(scheduler: Scheduler) -> float:
    """Return what a prompt token takes the worker whose scheduler this is, in full iterations and
    beside the sequences that decode there; 0 as long as it has not measured enough to know."""
    if not scheduler.costs.trusted:
        return 0.0
    budget = scheduler.config.max_batch_tokens
    return prefill_seconds(load_of(scheduler, NO_PROMPTS), PromptWork(budget)) / budget


class _Line:
    """The prompts of one place in the order of service, and when each would end."""

    def __init__(self, load: WorkerLoad) -> None:
        costs, running = load.costs, load.running
        self._costs = costs
        self._base = costs.seconds(running)
        self._room = load.budget
        if running.decodes:
            depth = load.queued.attended // max(load.queued.tokens, 1)
            room = costs.most_prompt_tokens(running, depth, load.budget, load.longest_iteration)
            self._room = max(MIN_ROOM, room)
        whole = self._base + costs.prompt_token * self._room
        self._credit = min(load.credit, whole)
        self._work = load.queued

    def add(self, prompt: Prompt[Key]) -> float:
        """Append a prompt; return the seconds until its last token is computed."""
        self._work = self._work.plus(prompt.start, prompt.end)
        return self._end(self._work)

    def end_of(self, prompt: Prompt[Key]) -> float:
        """Return what `add` would, and leave the line as it is."""
        return self._end(self._work.plus(prompt.start, prompt.end))

    def _end(self, work: PromptWork) -> float:
        return max(0.0, self.seconds(work) - self._credit)

    def seconds(self, work: PromptWork) -> float:
        iterations = max(1.0, work.tokens / self._room)
        costs = self._costs
        own = costs.prompt_token * work.tokens + costs.attended * work.attended
        return iterations * self._base + max(0.0, own)


def best_move(
    here: WorkerLoad,
    elsewhere: Mapping[str, WorkerLoad],
    prompts: Iterable[Prompt[Key]],
    margin: float,
    min_gain: float = 0.0,
) -> Move[Key] | None:
    """Return the move that gains the most time to a first token, or None if none is worth it.

    `here` is the decode worker, `elsewhere` the prefill workers that have said what they cost:
    nothing moves to or from another. `prompts`: all of the decode worker's own, in the order in
    which each place serves them. A prompt moves if that saves more than `min_gain` seconds and
    more than `margin` of its time.
    """
    local = _Line(here)
    lines = {name: _Line(load) for name, load in elsewhere.items()}
    placed: list[tuple[Prompt[Key], float]] = []
    for prompt in prompts:
        line = local if prompt.is_here else lines.get(prompt.target)
        if line is not None:
            placed.append((prompt, line.add(prompt)))
    best: Move[Key] | None = None
    for prompt, end in placed:
        line = lines.get(prompt.target) if prompt.is_here else local
        if line is None or not prompt.may_move:
            continue
        if not prompt.is_here and prompt.blocks > here.free_blocks:
            continue
        gain = end - line.end_of(prompt)
        if gain > max(min_gain, margin * end) and (best is None or gain > best.gain):
            best = Move(prompt.key, gain)
    return best


def load_of(scheduler: Scheduler, queued: PromptWork, credit: float = 0.0) -> WorkerLoad:
    """Return the load of the worker whose scheduler this is."""
    decoding = [seq for seq in scheduler.running if seq.num_uncomputed == 1]
    room = scheduler.prompt_room
    return WorkerLoad(
        costs=scheduler.costs.costs,
        budget=scheduler.config.max_batch_tokens,
        running=running_work(decoding),
        longest_iteration=room.longest_iteration(decoding) if room else math.inf,
        queued=queued,
        credit=credit,
        free_blocks=scheduler.pool.num_free - len(decoding),
    )


def prompts_here(scheduler: Scheduler) -> Iterator[Sequence]:
    """Yield the sequences whose prompt this worker computes or is to compute, in order of service.

    One that is swapped out waits for its KV, not for a prompt.
    """
    for sequence in (*scheduler.running, *scheduler.waiting):
        if not sequence.remote and sequence.num_uncomputed > 1 and not sequence.host_blocks:
            yield sequence


def prompt_of(
    scheduler: Scheduler,
    key: Key,
    sequence: Sequence,
    start: int,
    target: str,
    *,
    is_here: bool,
    moves_left: int,
) -> Prompt[Key]:
    """Describe a sequence of the decode worker whose scheduler this is: see `Prompt`."""
    return Prompt(
        key,
        start,
        sequence.num_tokens,
        target,
        is_here=is_here,
        may_move=moves_left > 0 and _may_leave(scheduler, sequence),
        blocks=scheduler.blocks_to_admit(sequence),
    )


def _may_leave(scheduler: Scheduler, sequence: Sequence) -> bool:
    """Whether no iteration writes its blocks, and they have room for what would come back."""
    if not sequence.block_table:
        return True
    return not sequence.num_under_way and scheduler.has_room(sequence)


def advised_move(
    scheduler: Scheduler,
    elsewhere: Mapping[str, WorkerLoad],
    prompts: Iterable[Prompt[Key]],
    config: LendingConfig,
) -> Key | None:
    """Return which of the first `MOST_PROMPTS` prompts of a decode worker is to move, if any."""
    if not elsewhere:
        return None
    for load in elsewhere.values():
        scheduler.costs.seed(load.costs)
    here = load_of(scheduler, NO_PROMPTS)
    looked_at = islice(prompts, MOST_PROMPTS)
    move = best_move(here, elsewhere, looked_at, config.margin, config.min_gain)
    return move.key if move else None


def may_change_places(work: Work, scheduler: Scheduler) -> bool:
    """Whether an iteration of a decode worker, with `work` in it, may be why a prompt should be
    computed elsewhere now.

    Not if there was no prompt in it and none waits to be computed here: then all are elsewhere, and
    decode steps, which take longer from token to token, only speak for leaving them there. So does
    a prompt that is done elsewhere and decodes here from now on. What speaks for fetching them is
    news of other kinds: a sequence ends, a leg ends early, a prefill worker reports.
    """
    if work.prompt_tokens:
        return True
    return any(not sequence.remote for sequence in islice(scheduler.waiting, MOST_PROMPTS))


def may_keep(
    scheduler: Scheduler,
    sequence: Sequence,
    load: WorkerLoad,
    phases: Collection[LegPhase],
    max_kept: int,
) -> bool:
    """Whether a prefill worker may decode a sequence for which the decode worker has no blocks.

    `phases`: of all legs of this decode worker there. Offered ones wait for blocks here, as this
    one does: there is nothing to do for them.
    """
    kept = sum(phase == "kept" for phase in phases)
    if kept >= max_kept or any(phase not in ("kept", "offered") for phase in phases):
        return False
    # What was kept since that report is not in it, and all of it will grow.
    return has_slack(load, sequence.num_tokens, scheduler.most_blocks(sequence) * (1 + kept))


def has_slack(load: WorkerLoad, num_tokens: int, blocks: int) -> bool:
    """Whether a prefill worker has no prompt to compute and room to decode one more request itself.

    `blocks`: what the request needs at its longest. A step with one sequence of `num_tokens` more
    must stay within `longest_iteration`.
    """
    if load.queued.tokens or blocks > load.free_blocks:
        return False
    running = load.running
    one_more = running._replace(decodes=running.decodes + 1, context=running.context + num_tokens)
    return load.costs.seconds(one_more) <= load.longest_iteration


def local_prefill_limit(config: TandemConfig) -> int:
    """Return the uncached tokens up to which a prompt is the decode worker's by default."""
    return 0 if config.lending.mode == "off" else config.worker.local_prefill_max_tokens
