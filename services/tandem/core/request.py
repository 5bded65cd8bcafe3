"""A request inside the cluster, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from tandem.core.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker needs to serve one stream of tokens.

    `token_ids` is the prompt followed by the tokens that earlier attempts emitted, so that a
    resubmitted request goes on where it was; `prompt_len` is where the outputs begin.
    """

    request_id: str
    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: SamplingParams
    attempt: int = 0
    priority: int = 0
    """Lower is served first; equal priorities are served in order of arrival."""
    cache_salt: str = ""
    """KV blocks are shared only between requests of the same salt."""
    tenant: str = ""
    """On whose account it is served, where tenants share fairly."""
    ttft_objective: float = 0.0
    """Seconds to the first token that the client wants; 0: what the configuration says."""
    itl_objective: float = 0.0
    """Seconds between tokens that the client wants; 0: what the configuration says."""
    reproducible: bool = False
    """Greedy, or with a seed of the client's own: asked again, it gets the same tokens. Known to
    the gateway only."""

    @property
    def max_len(self) -> int:
        """Tokens that the sequence has when `max_tokens` is reached."""
        return self.prompt_len + self.sampling.max_tokens


class TokenLogprob(NamedTuple):
    """Log-probability of one token at one position. `rank` 1 is the likeliest."""

    token_id: int
    logprob: float
    rank: int


class PositionLogprobs(NamedTuple):
    """The token that stands at a position and the likeliest alternatives there, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


class SampledToken(NamedTuple):
    """The token drawn for one sequence in one iteration."""

    token_id: int
    logprobs: PositionLogprobs | None
