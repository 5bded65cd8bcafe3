"""Does a prefill on one core slow the decode on the other? Eight streams, alone and beside prompts.

The streams' prompts are prefilled first. Alone, their gaps are taken once all have begun. Then the
same streams run again, and as soon as all have begun, long prompts of one token arrive and keep
the prefill worker busy; gaps count from the first long prompt's sending to the last one's token.
Pure; the cluster benchmark sends what is planned here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.cluster.plan import random_prompt
from benchmarks.measures import RequestRecord, percentile
from benchmarks.workload import PlannedRequest

STREAMS, CONTEXT, NEW_TOKENS = 8, 128, 96
LONG_PROMPTS, LONG_LENGTH = 4, 1500
MARGIN = 1.1
"""The prompts come this much later than the streams began when they were alone."""


@dataclass(frozen=True)
class Interference:
    """Gaps between tokens of the eight streams, in seconds."""

    alone_p50: float
    alone_mean: float
    busy_p50: float
    busy_mean: float
    busy_p99: float
    gaps: int
    """How many were measured beside prompts."""

    @property
    def ratio(self) -> float:
        """The median gap beside prompts over the one alone; the aim is 1.1 at most."""
        return self.busy_p50 / self.alone_p50


def plan_streams(vocab_size: int, seed: str) -> list[PlannedRequest]:
    """Return the eight streams, all at once."""
    rng = random.Random(f"streams {seed}")
    return [
        PlannedRequest(
            index, 0.0, random_prompt(rng, CONTEXT, vocab_size), NEW_TOKENS, shared=False
        )
        for index in range(STREAMS)
    ]


def plan_long_prompts(vocab_size: int, at: float, seed: str) -> list[PlannedRequest]:
    """Return the prompts that keep the prefill worker busy from `at` on; none has been seen before
    with another seed."""
    rng = random.Random(seed)
    return [
        PlannedRequest(
            STREAMS + index, at, random_prompt(rng, LONG_LENGTH, vocab_size), 1, shared=False
        )
        for index in range(LONG_PROMPTS)
    ]


def all_began(streams: Sequence[RequestRecord]) -> float:
    """Return when the last of the streams had its first token."""
    return max(record.token_times[0] for record in streams)


def compare(alone: Sequence[RequestRecord], beside: Sequence[RequestRecord]) -> Interference:
    """Compare the streams alone with the run that has the long prompts behind them.

    Raises `ValueError` when the streams had ended before the prompts came.
    """
    streams, prompts = beside[:STREAMS], beside[STREAMS:]
    quiet = _gaps(alone, all_began(alone), float("inf"))
    busy = _gaps(
        streams,
        max(all_began(streams), min(record.sent_at for record in prompts)),
        max(record.token_times[-1] for record in prompts),
    )
    if not busy or not quiet:
        raise ValueError("the streams and the prompts did not run at the same time")
    return Interference(
        alone_p50=percentile(quiet, 50) or 0.0,
        alone_mean=fmean(quiet),
        busy_p50=percentile(busy, 50) or 0.0,
        busy_mean=fmean(busy),
        busy_p99=percentile(busy, 99) or 0.0,
        gaps=len(busy),
    )


def _gaps(records: Sequence[RequestRecord], start: float, end: float) -> list[float]:
    """The gaps that lie wholly within [start, end]."""
    return [
        later - earlier
        for record in records
        for earlier, later in zip(record.token_times, record.token_times[1:], strict=False)
        if earlier >= start and later <= end
    ]
