"""One request on its way through the simulated cluster. State, and the times that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.core.request import Request
from tandem.core.sequence import Sequence
from tandem.router.lending import NO_PROMPTS, LegPhase, PromptWork

if TYPE_CHECKING:
    from tandem.simulator.decode import SimulatedDecode
    from tandem.simulator.prefill import SimulatedPrefill


@dataclass(slots=True, eq=False)
class SimulatedLeg:
    """One prefill of one request on one prefill worker."""

    sequence: Sequence
    """On the prefill worker."""
    num_tokens: int
    phase: LegPhase = "asked"
    was_asked: bool = False
    held_tokens: int = 0
    granted_at: float = 0.0
    landed_at: float = 0.0
    """When the last of its pieces so far arrives."""
    first_token_at: float = 0.0
    has_landed: bool = False
    computed: int = 0
    """Tokens that the prefill worker has said to have computed."""
    left: PromptWork = NO_PROMPTS
    """What the prefill worker still has to compute, as it knows."""
    is_kept: bool = False
    """Whether the prefill worker decodes it while the decode worker has no blocks."""
    was_kept: bool = False
    reserved_tokens: int = 0
    """Of a kept leg that was granted: tokens whose KV has a place."""


@dataclass(slots=True, eq=False)
class Flight:
    """One request from arrival to its last token."""

    request: Request
    hashes: list[bytes]
    arrival: float
    decode: SimulatedDecode
    prefill: SimulatedPrefill | None
    sequence: Sequence
    """On the decode worker."""
    leg: SimulatedLeg | None = None
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    longest_gap: float = 0.0
    preemptions: int = 0
    moves: int = 0
    """Times that its prompt went from one pool to the other."""
    is_lent: bool = False
    """Whether the decode worker computes its prompt for the prefill pool."""
