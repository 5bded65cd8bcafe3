"""The events of a timeline: iterations, KV on its way, and the stages of every request.

Times are seconds on one clock, whichever: the simulator's virtual one, or that of whoever
collected a trace. A stage that a request passes several times (attempts, preemption) is there
several times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from tandem.core.sequence import IterationPlan

StageName = Literal[
    "received",  # gateway: the request is there
    "tokenized",  # gateway: checked, and its tokens are known
    "routed",  # gateway: it has its workers
    "submitted",  # gateway: on its way to the decode worker
    "arrived",  # decode worker: off the wire
    "accepted",  # decode worker: in the engine thread
    "asked",  # decode worker: the leg is on its way to the prefill worker
    "leg_arrived",  # prefill worker: off the wire
    "queued",  # prefill worker: in the engine thread
    "offered",  # prefill worker: its turn is near
    "granted",  # decode worker: blocks are reserved
    "started",  # prefill worker: blocks are reserved there too, compute or a fetch begins
    "first_token",  # decode worker: emitted
    "landed",  # decode worker: the engine thread knows that the last piece is in its blocks
    "joined",  # decode worker: in the running batch
    "preempted",  # decode worker: out of blocks
    "finished",  # decode worker: blocks released
    "client_first",  # gateway: the first token goes to the client
    "client_last",  # gateway: the last one
]
STAGES: tuple[StageName, ...] = get_args(StageName)


class Part(NamedTuple):
    """One sequence's share of an iteration."""

    request: str
    start: int
    length: int
    is_decode: bool = False
    """A decode step rather than a chunk of tokens that had none of their KV."""


class Iteration(NamedTuple):
    """One box."""

    worker: str
    began: float
    ended: float
    parts: tuple[Part, ...]


class Transfer(NamedTuple):
    """KV of one chunk, or of one group of layers of it, on its way."""

    sender: str
    receiver: str
    request: str
    began: float
    """Packing begins; in the simulator, the first byte leaves."""
    ended: float
    """It stands in the receiver's blocks."""
    start: int = 0
    length: int = 0
    first_layer: int = 0
    num_layers: int = 0
    packed: float | None = None
    announced: float | None = None
    sent: float | None = None


class Stage(NamedTuple):
    """A request passed a boundary."""

    process: str
    """Where: the name of a worker or of a gateway."""
    at: float
    request: str
    name: StageName


def parts_of(plan: IterationPlan) -> tuple[Part, ...]:
    """What runs together in an iteration.

    A token past the prompt on its own is a decode step; anything else is a chunk.
    """
    return tuple(
        Part(
            (request := chunk.sequence.request).request_id,
            chunk.start,
            chunk.length,
            chunk.length == 1 and chunk.start >= request.prompt_len,
        )
        for chunk in plan.chunks
    )


@dataclass
class Timeline:
    """Keeps what happens in the first `until` seconds."""

    until: float = float("inf")
    iterations: list[Iteration] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    def iteration(self, worker: str, began: float, ended: float, plan: IterationPlan) -> None:
        """Note an iteration."""
        if began <= self.until:
            self.iterations.append(Iteration(worker, began, ended, parts_of(plan)))

    def transfer(self, transfer: Transfer) -> None:
        """Note KV on its way."""
        if transfer.began <= self.until:
            self.transfers.append(transfer)

    def stage(self, process: str, at: float, request: str, name: StageName) -> None:
        """Note that a request passed a boundary."""
        if at <= self.until:
            self.stages.append(Stage(process, at, request, name))

    def span(self) -> tuple[float, float]:
        """The first and the last moment of which anything is known; (0, 1) when nothing is."""
        begins = [box.began for box in self.iterations] + [kv.began for kv in self.transfers]
        ends = [box.ended for box in self.iterations] + [kv.ended for kv in self.transfers]
        times = [stage.at for stage in self.stages]
        if not begins and not times:
            return (0.0, 1.0)
        return (min(begins + times), max(ends + times))
