"""What a simulated run was like: latencies, goodput, use of workers, blocks and links."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tandem.kvcache.block_pool import BlockPool

SLO_NAMES = ("ttft", "tpot", "itl")
_BIN = math.log(1.01)


class Histogram:
    """Durations in bins one per cent wide: percentiles of any number of them in little memory."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self._most = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a duration above 0, so often."""
        self._bins[int(math.log(seconds) // _BIN)] += count
        if seconds > self._most:
            self._most = seconds

    def add_all(self, durations: Sequence[float], count: int = 1) -> None:
        """Count each of some durations above 0, so often; soon done if all are about equal."""
        longest = max(durations)
        if math.log(min(durations)) // _BIN == math.log(longest) // _BIN:
            self.add(longest, count * len(durations))
            return
        for seconds in durations:
            self.add(seconds, count)

    @property
    def num_added(self) -> int:
        """Durations counted."""
        return self._bins.total()

    def percentile(self, percent: float) -> float:
        """Return the duration that `percent` of them do not exceed, to one per cent."""
        rank = percent / 100 * self._bins.total()
        seen = 0
        for index in sorted(self._bins):
            seen += self._bins[index]
            if seen >= rank and seen:
                return min(math.exp((index + 0.5) * _BIN), self._most)
        return math.nan


@dataclass(slots=True)
class PoolUse:
    """What the workers of one role did, all together."""

    num_workers: int
    busy_seconds: float = 0.0
    iterations: int = 0
    tokens: int = 0
    used_block_seconds: float = 0.0
    most_used: float = 0.0

    def count(self, pool: BlockPool, tokens: int, seconds: float, iterations: int) -> None:
        """Count iterations of one of them: their tokens and seconds, all together."""
        self.busy_seconds += seconds
        self.iterations += iterations
        self.tokens += tokens
        used = pool.num_used / pool.num_blocks
        self.used_block_seconds += used * seconds
        if used > self.most_used:
            self.most_used = used

    def summary(self, seconds: float) -> dict[str, float]:
        """Shares in [0, 1]; blocks as of busy time."""
        return {
            "busy": self.busy_seconds / (seconds * self.num_workers) if self.num_workers else 0.0,
            "blocks_mean": self.used_block_seconds / max(self.busy_seconds, 1e-9),
            "blocks_max": self.most_used,
            "tokens_per_iteration": self.tokens / max(self.iterations, 1),
        }


@dataclass
class Report:
    """Filled while a simulation runs."""

    slo: Mapping[str, float] = field(default_factory=dict)
    """Seconds for any of `SLO_NAMES`; `itl` bounds a request's longest gap."""
    ttfts: list[float] = field(default_factory=list)
    tpots: list[float] = field(default_factory=list)
    longest_gaps: list[float] = field(default_factory=list)
    gaps: Histogram = field(default_factory=Histogram)
    exposed: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    num_finished: int = 0
    num_good: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    """Requests that missed each objective."""
    num_preemptions: int = 0
    kept_tokens: int = 0
    """Tokens that prefill workers sampled while decode workers had no blocks."""
    lent_tokens: int = 0
    """Prompt tokens that decode workers computed for the prefill pool."""
    output_tokens: int = 0
    seconds: float = 0.0
    """From the first arrival to the last token."""
    pools: dict[str, PoolUse] = field(default_factory=dict)
    link_busy: float = 0.0
    """Mean share of time that a sender's link was in use."""
    kv_bytes: float = 0.0

    def finished(self, ttft: float, tpot: float | None, longest_gap: float) -> None:
        """Count a request that got all its tokens; TPOT is None if there was only one."""
        self.num_finished += 1
        measured = {"ttft": ttft, "tpot": tpot or 0.0, "itl": longest_gap}
        missed = [name for name, bound in self.slo.items() if measured[name] > bound]
        self.num_good += not missed
        self.missed.update(missed)
        if tpot is not None:
            self.tpots.append(tpot)
            self.longest_gaps.append(longest_gap)

    def exposed_transfer(self, seconds: float) -> None:
        """Count how long a first token was out before its KV had landed."""
        self.exposed.append(seconds)

    def summary(self) -> dict[str, object]:
        """Everything, as plain data."""
        seconds = max(self.seconds, 1e-9)
        return {
            "requests": self.num_finished,
            "refused": self.refusals.total(),
            "refusals": dict(self.refusals),
            "seconds": self.seconds,
            "ttft": percentiles(self.ttfts),
            "itl": {name: self.gaps.percentile(percent) for name, percent in PERCENTILES.items()},
            "tpot": percentiles(self.tpots),
            "longest_gap": percentiles(self.longest_gaps),
            "slo": dict(self.slo),
            "slo_met": self.num_good / max(self.num_finished + self.refusals.total(), 1),
            "missed": dict(self.missed),
            "goodput": self.num_good / seconds,
            "output_tokens_per_second": self.output_tokens / seconds,
            "preemptions": self.num_preemptions,
            "lent_tokens": self.lent_tokens,
            "kept_tokens": self.kept_tokens,
            "pools": {role: use.summary(seconds) for role, use in self.pools.items()},
            "link_busy": self.link_busy,
            "kv_bytes": self.kv_bytes,
            "exposed_transfer": percentiles(self.exposed),
        }


PERCENTILES: Mapping[str, float] = {"p50": 50, "p90": 90, "p99": 99}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Nearest-rank percentiles and the mean; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys([*PERCENTILES, "mean"], math.nan)
    ranks = {
        name: ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
        for name, percent in PERCENTILES.items()
    }
    return {**ranks, "mean": math.fsum(ordered) / len(ordered)}
