"""A request while the decode worker holds it, and the leg that prefills it elsewhere: state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from tandem.core.request import PositionLogprobs, Request
from tandem.core.sequence import Sequence
from tandem.router.lending import LegPhase
from tandem.v1 import worker_pb2
from tandem.worker.landing import LandingProgress

if TYPE_CHECKING:
    from tandem.decode.peers import PrefillPeer
    from tandem.decode.sessions import GatewaySession


@dataclass(slots=True, eq=False)
class Leg:
    """One prefill of one request on one prefill worker.

    ::

        asked --Offer--> offered --blocks reserved--> granted --all KV landed + first token--> over
          |                 |                            |
          +---- peer lost, failed, or cancelled: over; what has landed stays with the sequence

    An offered leg for which there are no blocks may be *kept*: the prefill worker computes it and
    goes on decoding, until blocks are reserved and it is granted; then KV and request come here.
    A granted leg may be *cut*: the prefill worker stops at the end of the chunk under way, and once
    what it computed has landed this worker goes on from there.
    """

    leg_id: int
    peer: PrefillPeer
    sequence: Sequence
    num_tokens: int
    """Tokens that the sequence had when the leg began: all of them get KV."""
    phase: LegPhase = "asked"
    was_asked: bool = False
    """Whether the prefill worker knows of it already, so that a grant is a message of its own."""
    landing: LandingProgress | None = None
    held: int = 0
    """Tokens that needed no KV from the peer."""
    was_kept: bool = False
    """Whether the prefill worker has been told to decode it: tokens may come before any KV."""
    computed: int = 0
    """Tokens from the start that the peer has said to have computed."""
    cut_at: int | None = None
    """Where the peer stopped, once it has said so."""
    first_token_at: float | None = None
    last_piece_at: float = 0.0
    granted_at: float = 0.0
    num_granted: int = 0
    """Tokens whose KV it was granted to bring."""
    last_event_at: float = 0.0
    """When anything was last heard of it, once it is granted."""
    transfer_seconds: float = 0.0
    kv_bytes: int = 0

    @property
    def num_ready(self) -> int:
        """Tokens that nobody need compute any more."""
        return max(self.held, self.computed)


@dataclass(slots=True, eq=False)
class ActiveRequest:
    """One request from submission to its last token."""

    sequence: Sequence
    session: GatewaySession
    target: worker_pb2.PrefillTarget | None
    submitted_at: float
    leg: Leg | None = None
    awaiting_reassign_since: float | None = None
    started_at: float | None = None
    """When the first prefill iteration began, here or on the prefill worker."""
    first_token_at: float | None = None
    cached_tokens: int | None = None
    prefill_worker: str = ""
    moves: int = 0
    """Times that its prompt went from one pool to the other."""
    is_lent: bool = False
    """Whether its prompt is computed here although the router named a prefill worker."""
    handover: worker_pb2.HandoverInfo | None = None
    """How its KV came; goes out with the next token."""
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    """Of positions 1, 2, ... in order."""
    logprobs_covered: int = 0
    """Prompt positions whose logprobs have come."""

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def key(self) -> tuple[str, int]:
        return (self.request.request_id, self.request.attempt)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs are asked for and not delivered yet."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and self.sequence.num_output_tokens == 0

    def add_prompt_logprobs(self, start: int, entries: Iterable[PositionLogprobs]) -> None:
        """Take the logprobs that came out of computing tokens from `start` on.

        Entry i speaks of position start + 1 + i; positions that have come before are skipped, as
        when a chunk is computed a second time.
        """
        have = len(self.prompt_logprobs)
        self.prompt_logprobs.extend(islice(entries, max(0, have - start), None))
