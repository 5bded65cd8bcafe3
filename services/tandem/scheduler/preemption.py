"""How to get a block when none is left: copy a sequence's KV away, drop it, or wait. Pure.

What each way costs is estimated in seconds, from what was measured on this worker; the cheapest is
taken. Who gives way is not decided here: that is `Policy.precedence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from tandem.core.config import SchedulerConfig
from tandem.scheduler.costs import CostEstimator, Work

Way = Literal["swap", "refill", "wait"]
WAYS: tuple[Way, ...] = ("refill", "swap", "wait")
"""Among equals the first is taken: as long as nothing is measured, KV is made again."""

COPY_BYTES_PER_SECOND = 4e9
"""Believed of copies to and from the host until one was measured."""
_NEWEST = 0.2
"""Weight of the newest measurement in a mean."""


class Options(NamedTuple):
    """Seconds that each way costs; None: not possible now."""

    wait: float | None
    swap: float | None
    refill: float


class Mean:
    """A mean that forgets."""

    def __init__(self, first: float | None = None) -> None:
        self.value = first

    def add(self, value: float) -> None:
        self.add_all((value,))

    def add_all(self, values: Sequence[float]) -> None:
        """Add one after the other; at least one."""
        mean = values[0] if self.value is None else self.value
        for value in values:
            mean += _NEWEST * (value - mean)
        self.value = mean


class Preemption:
    """What this worker has measured of each way, and the choice between them."""

    def __init__(
        self,
        config: SchedulerConfig,
        costs: CostEstimator,
        block_bytes: int = 0,
        block_size: int = 1,
    ) -> None:
        self._mode = config.preemption
        self._costs = costs
        self._block_size = block_size
        block_seconds = block_bytes / COPY_BYTES_PER_SECOND
        self._out, self._in = Mean(block_seconds), Mean(block_seconds)
        self._refill_per_token = Mean()
        self._step = Mean()
        self._share_used = Mean(1.0)
        self._knows_prompts = False

    # ------------------------------------------------------------------ what it is told

    def copied(self, num_blocks: int, seconds: float, to_host: bool) -> None:
        """A copy of some blocks took so long."""
        (self._out if to_host else self._in).add(seconds / max(1, num_blocks))

    def prefilled(self, num_tokens: int, seconds: float) -> None:
        """A prefill worker computed and sent KV of so many tokens, from the grant to the last."""
        if num_tokens > 0:
            self._refill_per_token.add(seconds / num_tokens)

    def measured_run(self, work: Work, seconds: Sequence[float]) -> None:
        """Iterations in a row took so long; the first had `work`. The estimator has been told."""
        self._step.add_all(seconds)
        self._knows_prompts = self._knows_prompts or work.prompt_tokens > 0

    def ended(self, num_outputs: int, most_outputs: int) -> None:
        """A sequence has ended by itself or at its bound."""
        self._share_used.add(num_outputs / max(1, most_outputs))

    # ------------------------------------------------------------------ estimates, in seconds

    def swap_seconds(self, num_blocks: int) -> float:
        """Copying so many blocks out, and back in later."""
        return num_blocks * ((self._out.value or 0.0) + (self._in.value or 0.0))

    def copy_in_seconds(self, num_blocks: int) -> float:
        return num_blocks * (self._in.value or 0.0)

    def refill_seconds(self, num_tokens: int) -> float:
        """Making the KV of so many tokens again.

        By the legs of prefill workers if there were any, transfer included, else by what prompt
        chunks cost here; 0 as long as neither is known.
        """
        if self._refill_per_token.value is not None:
            return num_tokens * self._refill_per_token.value
        if not (self._knows_prompts and self._costs.trusted):
            return 0.0
        return self._costs.seconds(Work().plus_prompt(0, num_tokens))

    def wait_seconds(self, most_tokens: int) -> float:
        """Until a sequence ends that may produce `most_tokens` more.

        The bound on its tokens is `max_tokens`; sequences that ended before used a certain share of
        theirs, and the same is expected of this one. One token takes an iteration.
        """
        return most_tokens * (self._share_used.value or 0.0) * (self._step.value or 0.0)

    @property
    def host_value(self) -> float:
        """Share of the time to compute a block that copying it back from host memory saves."""
        tokens = 1024
        computing = self.refill_seconds(tokens)
        if computing <= 0:
            return 0.5  # nobody knows yet
        copying = self.copy_in_seconds(1) * tokens / self._block_size
        return min(1.0, max(0.0, 1.0 - copying / computing))

    # ------------------------------------------------------------------ decisions

    def choose(self, options: Options) -> Way:
        """Return the configured way if it is possible; else, or if it is `auto`, the cheapest."""
        if self._mode == "refill":
            return "refill"
        if self._mode == "swap":
            return "swap" if options.swap is not None else "refill"
        if self._mode == "wait" and options.wait is not None:
            return "wait"
        seconds = {way: cost for way in WAYS if (cost := getattr(options, way)) is not None}
        return min(seconds, key=seconds.__getitem__)

    def restore_pays(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether to copy a spilled prefix back instead of computing it.

        Also as long as nobody knows what computing costs: a copy leaves the device to others.
        """
        computing = self.refill_seconds(num_tokens)
        return computing == 0 or self.copy_in_seconds(num_blocks) < computing
