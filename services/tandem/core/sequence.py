"""A sequence: one request while a worker holds it, and the plan of one iteration over many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from tandem.core.request import FinishReason, Request

Phase = Literal["waiting", "receiving", "running", "preempted", "finished"]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on one worker.

    ::

        waiting --admit--> running --sample ... --> finished
           |                  |  ^
           |                  v  | requeue
           |               preempted (or, with its KV in host memory, at once waiting)
           +--admit (remote, or KV to copy back)--> receiving --KV landed--> running

    `token_ids[:num_computed]` have their KV in `block_table`, or get it in an iteration under way;
    everything after is still to be computed. An iteration under way may also draw tokens that are
    not in `token_ids` yet: they are *in flight*. Behaviour that changes a sequence lives in the
    scheduler.
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
    num_in_flight: int = 0
    """Tokens that iterations under way will draw and after which the sequence can go on."""
    num_under_way: int = 0
    """Iterations under way that write its blocks: until they have ended, these are not free."""
    num_cached: int = 0
    """Tokens found in the prefix cache when it was last admitted."""
    host_blocks: list[int] = field(default_factory=list)
    """Blocks of the host tier with its first `num_in_host` tokens, while it is swapped out."""
    num_in_host: int = 0
    was_preempted: bool = False
    arrived_at: float = 0.0
    """When it came to this worker, on the clock whose time `Scheduler.schedule` is given."""
    planned_at: float = 0.0
    """When the iteration was planned that last computed for it."""
    phase: Phase = "waiting"
    finish_reason: FinishReason | None = None

    max_len: int = field(init=False)
    """What its request says of both, at hand because every iteration asks."""
    penalises: bool = field(init=False)
    order: tuple[int, int] = field(init=False)
    """Sort key: who is served first."""
    holder: str = field(init=False)
    """The name under which it holds blocks; its arrival tells equal request ids apart."""

    def __post_init__(self) -> None:
        request = self.request
        self.max_len = request.max_len
        self.penalises = request.sampling.penalises
        self.order = (request.priority, self.arrival)
        self.holder = f"{request.request_id}#{request.attempt}@{self.arrival}"
        if not self.token_ids:
            self.token_ids = list(request.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV no iteration has computed or is computing: 1 for a sequence that decodes.

        A token in flight counts: it can be the input of an iteration before anybody here knows it.
        """
        return len(self.token_ids) + self.num_in_flight - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.request.prompt_len


class _ChunkFields(NamedTuple):
    sequence: Sequence
    start: int
    length: int
    samples: bool
    """Whether it ends with the sequence's last token as of the plan, so that one is drawn."""
    input_in_flight: bool
    """Whether its only token is drawn by the iteration before: the engine takes it from there."""


class ScheduledChunk(_ChunkFields):
    """Tokens [start, start + length) of a sequence, to be computed in one iteration.

    What follows from the sequence's tokens is settled when the chunk is made: by the time that the
    iteration ends, the sequence may have grown.
    """

    __slots__ = ()

    def __new__(cls, sequence: Sequence, start: int, length: int) -> ScheduledChunk:
        known = len(sequence.token_ids)
        end = start + length
        samples = end == known + sequence.num_in_flight
        return tuple.__new__(cls, (sequence, start, length, samples, end > known))

    @property
    def end(self) -> int:
        return self.start + self.length


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
