"""A sequence: one request while a worker holds it, and the plan of one iteration over many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tandem.core.request import FinishReason, Request

Phase = Literal["waiting", "receiving", "running", "preempted", "finished"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on one worker.

    ::

        waiting --admit--> running --sample ... --> finished
           |                  |  ^
           |                  v  | requeue
           |               preempted
           +--admit (remote)--> receiving --KV landed--> running

    `token_ids[:num_computed]` have their KV in `block_table`; everything after is still to be
    computed. Behaviour that changes a sequence lives in the scheduler.
    """

    request: Request
    arrival: int
    """Order of arrival on this worker; breaks ties between equal priorities."""
    remote: bool = False
    """True while the KV of its prompt is to come from a prefill worker."""
    token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hashes of the full blocks of `token_ids` hashed so far."""
    num_computed: int = 0
    num_cached: int = 0
    """Tokens found in the prefix cache when it was last admitted."""
    arrived_at: float = 0.0
    """When it came to this worker, on the clock whose time `Scheduler.schedule` is given."""
    planned_at: float = 0.0
    """When the iteration was planned that last computed for it."""
    phase: Phase = "waiting"
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.request.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is still missing: 1 for a sequence that decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.prompt_len

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: who is served first."""
        return (self.request.priority, self.arrival)


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens [start, start + length) of a sequence, to be computed in one iteration."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether this chunk ends with the last known token, so that the next one is drawn."""
        return self.end == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """What one forward pass computes, and what changed hands to make room for it."""

    chunks: tuple[ScheduledChunk, ...]
    admitted: tuple[Sequence, ...] = ()
    """Sequences that left the queue in this plan; remote ones now hold blocks and await KV."""
    preempted: tuple[Sequence, ...] = ()
    """Sequences that lost their blocks; the worker decides how they are refilled."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)
