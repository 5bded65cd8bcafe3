"""The arithmetic of a benchmark: what the times of single tokens say about a run.

Pure: no clock, no I/O. Definitions are those of docs/benchmarks.md. Seconds throughout; a figure
that has no data is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median


@dataclass(frozen=True)
class Objectives:
    """What a request must keep to count for goodput."""

    ttft: float
    tpot: float
    gap: float | None = None
    """No gap between two tokens may be longer; None: any may."""


@dataclass(frozen=True)
class RequestRecord:
    """What the client saw of one request. Times are seconds since the run began."""

    index: int
    scheduled_at: float
    sent_at: float
    token_times: tuple[float, ...]
    """Arrival of every token, in order; tokens of one event share its time."""
    expected_tokens: int
    prompt_tokens: int
    cached_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Every token that was asked for came, and no error."""
        return not self.error and len(self.token_times) == self.expected_tokens

    @property
    def ttft(self) -> float:
        """Send to first token."""
        return self.token_times[0] - self.sent_at

    @property
    def e2e(self) -> float:
        """Send to last token."""
        return self.token_times[-1] - self.sent_at

    @property
    def tpot(self) -> float | None:
        """(E2E - TTFT) / (n - 1); None for a single token."""
        gaps = len(self.token_times) - 1
        return (self.e2e - self.ttft) / gaps if gaps > 0 else None

    @property
    def gaps(self) -> list[float]:
        """The gaps between tokens."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    def meets(self, objectives: Objectives) -> bool:
        """Whether it ended well and kept every objective."""
        if not self.ok:
            return False
        tpot = self.tpot
        if self.ttft > objectives.ttft or (tpot is not None and tpot > objectives.tpot):
            return False
        return objectives.gap is None or max(self.gaps, default=0.0) <= objectives.gap


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Return the percentile by linear interpolation between closest ranks; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(records: Sequence[RequestRecord], objectives: Objectives) -> dict[str, float | None]:
    """Return a run's figures by name.

    Latencies are of requests that ended well. The run lasts from the first send to the last
    token, so throughput and goodput pay for the tail in which the queue drains.
    """
    good = [record for record in records if record.ok]
    ttfts = [record.ttft for record in good]
    tpots = [tpot for record in good if (tpot := record.tpot) is not None]
    gaps = [gap for record in good for gap in record.gaps]
    seconds = duration(records)
    tokens = sum(len(record.token_times) for record in records)
    prompt_tokens = sum(record.prompt_tokens for record in good)
    kept = sum(record.meets(objectives) for record in records)
    return {
        "ttft_mean": fmean(ttfts) if ttfts else None,
        "ttft_p50": percentile(ttfts, 50),
        "ttft_p99": percentile(ttfts, 99),
        "ttft_max": max(ttfts, default=None),
        "itl_p50": percentile(gaps, 50),
        "itl_p99": percentile(gaps, 99),
        "itl_max": max(gaps, default=None),
        "tpot_p50": percentile(tpots, 50),
        "tpot_p99": percentile(tpots, 99),
        "output_tokens_per_second": ratio(tokens, seconds),
        "goodput": ratio(kept, seconds),
        "attainment": ratio(kept, len(records)),
        "prefix_hit_rate": ratio(sum(record.cached_tokens for record in good), prompt_tokens),
        "failures": float(len(records) - len(good)),
        "requests": float(len(records)),
        "duration": seconds,
    }


def duration(records: Sequence[RequestRecord]) -> float:
    """Return the seconds from the first send to the last token that came."""
    if not records:
        return 0.0
    start = min(record.sent_at for record in records)
    end = max((record.token_times[-1] for record in records if record.token_times), default=start)
    return end - start


def ratio(part: float, whole: float) -> float | None:
    """Return part / whole; None where there is nothing to divide by."""
    return part / whole if whole else None


@dataclass(frozen=True)
class Spread:
    """One figure over several runs."""

    median: float
    low: float
    high: float


def spread(runs: Sequence[dict[str, float | None]], name: str) -> Spread | None:
    """Return the median and range of one figure over the runs that have it."""
    values = [value for run in runs if (value := run.get(name)) is not None]
    return Spread(median(values), min(values), max(values)) if values else None
