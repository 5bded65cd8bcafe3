"""One prefill of one request, seen from the prefill worker. State only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tandem.core.sequence import Sequence
from tandem.worker.landing import LandingProgress

if TYPE_CHECKING:
    from tandem.prefill.sessions import DecodePeer

LegPhase = Literal["queued", "offered", "granted", "fetching", "computing", "keeping"]


@dataclass(slots=True, eq=False)
class PrefillLeg:
    """
    ::

        queued --near the head--> offered --Grant--> granted --blocks--> [fetching -->] computing
           |
           +--request came with a grant--> granted
           +--offered, and no blocks there--> keeping --Grant--> computing, or over

    A kept leg is computed and decoded here; its tokens are sent one by one. With the grant its KV
    goes, and if it has a token already, the decode worker goes on.

    It ends when the first token is sampled, when the decode worker cancels or is lost, or when it
    fails; the transfer's hold on its blocks may outlive it.
    """

    peer: DecodePeer
    leg_id: int
    sequence: Sequence
    received_at: float
    phase: LegPhase = "queued"
    held_tokens: int = 0
    """Tokens from the start whose KV the decode worker has: they are not sent."""
    fetched: LandingProgress | None = None
    started_at: float = 0.0
    chunks: int = 0
    """Chunks computed so far; stamps what is sent."""
