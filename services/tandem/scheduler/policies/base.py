"""The interface between the scheduler and its policies, and the two ways to share a budget.

A policy orders and sizes; the scheduler owns blocks, admission, preemption and every limit. So the
worst that a bad policy can do is to be slow: it cannot exceed a budget, leak a block or deadlock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as Rows
from typing import NamedTuple, Protocol

from tandem.core.sequence import IterationPlan, Sequence
from tandem.scheduler.costs import Work


class Task(NamedTuple):
    """A wish: compute up to `max_tokens` of a sequence in this iteration, admitting it first."""

    sequence: Sequence
    max_tokens: int


class Steps(NamedTuple):
    """A wish for one token of each sequence, the dearest first: as many tasks, at once.

    Granting it takes less time than granting the tasks, which matters to many that decode.
    """

    sequences: Rows[Sequence]


class View(Protocol):
    """What a policy sees while an iteration is composed. Always as of now, also between tasks."""

    @property
    def now(self) -> float:
        """Seconds, on the clock that `Sequence.arrived_at` is of."""

    @property
    def tokens_left(self) -> int:
        """What is left of the iteration's token budget."""

    @property
    def num_planned(self) -> int:
        """Sequences that compute in this iteration so far."""

    @property
    def running(self) -> Collection[Sequence]:
        """Sequences that hold their blocks and can compute, first served first."""

    @property
    def decoding(self) -> list[Sequence]:
        """Those of them that lack the KV of one token."""

    @property
    def prompts(self) -> list[Sequence]:
        """Those of them that lack more."""

    @property
    def num_receiving(self) -> int:
        """Sequences whose KV is on its way from a prefill worker."""

    @property
    def waiting(self) -> Collection[Sequence]:
        """The queue, first served first; empty when nobody can be admitted in this iteration."""


class Policy(ABC):
    """What the next iteration computes. One instance per worker; `tasks` is all that it must have.

    Decisions may depend on the arguments and on earlier calls, on nothing else: no clock, no I/O,
    no global randomness.
    """

    @abstractmethod
    def tasks(self, view: View) -> Iterable[Task | Steps]:
        """Yield wishes, the dearest first.

        The scheduler grants each one, cut to what budget is left, before it asks for the next. The
        first sequence in the queue that does not fit ends admission for this iteration, so that
        small ones do not starve a large one of blocks. Admitting a remote sequence costs no tokens.
        """

    def line(self, waiting: Iterable[Sequence], now: float) -> Iterable[Sequence]:
        """Order those that wait, first served first. They come sorted by `Sequence.order`."""
        return waiting

    def precedence(self, seq: Sequence) -> tuple[float, ...]:
        """Who keeps blocks when they are short: the greatest is preempted first.

        Must not change while a sequence lives: then the first one always finishes, and two
        sequences never take turns in evicting each other. How much is computed between two
        preemptions of one sequence: see `scheduler.scheduler`.
        """
        return seq.order

    def arrived(self, seq: Sequence, waiting: Iterable[Sequence]) -> None:
        """Hear of a new sequence before it joins those that are `waiting`."""
        return

    def planned(self, plan: IterationPlan) -> None:
        """Hear what was granted."""
        return

    def measured(self, work: Work, seconds: float) -> None:
        """Hear how long an iteration took."""
        return


def stall_free(
    view: View, prompts: Iterable[Sequence], waiting: Iterable[Sequence], chunk: int
) -> Iterator[Task | Steps]:
    """Wish for every decode step, then for chunks of prompts in what is left."""
    yield Steps(view.decoding)
    for seq in prompts:
        yield Task(seq, chunk)
    for seq in waiting:
        yield Task(seq, chunk)


def prompt_room(
    view: View, prompts: Iterable[Sequence], waiting: Iterable[Sequence], room: int
) -> Iterator[Task]:
    """Wish for prompt tokens, first served first, `room` of them in the whole iteration."""
    end = view.tokens_left - room
    for seq in prompts:
        if view.tokens_left <= end:
            break
        yield Task(seq, view.tokens_left - end)
    for seq in waiting:
        if view.tokens_left <= end and not seq.remote:
            return
        yield Task(seq, max(1, view.tokens_left - end))
