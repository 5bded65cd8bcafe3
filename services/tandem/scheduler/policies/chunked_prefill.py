"""Chunked prefill, stall-free: decode first, then prompt chunks in what is left of the budget."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.config import SchedulerConfig
from tandem.scheduler.policies.base import Policy, Steps, Task, View, stall_free


class ChunkedPrefill(Policy):
    """Optimises both latencies at once: running sequences never miss an iteration, and prompts fill
    what decoding leaves unused (Sarathi-Serve, arXiv:2403.02310).

    Costs: iterations with a chunk are longer than pure decode steps, and a long prompt reads its
    own KV again for every chunk. `chunk_size` and `max_batch_tokens` trade one for the other.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._chunk_size = config.chunk_size

    def tasks(self, view: View) -> Iterable[Task | Steps]:
        return stall_free(view, view.prompts, view.waiting, self._chunk_size)
