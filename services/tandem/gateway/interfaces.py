"""What the edges of the gateway and its dispatcher agree on. Plain data and protocols, no code.

Invariant: a request is over when its output stream yields an event with a `finish_reason`, raises a
`TandemError`, or is closed; closing it cancels the request everywhere.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tandem.core.request import FinishReason, PositionLogprobs, Request
from tandem.gateway.changes import Changes


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that the cluster serves, as the membership names it."""

    name: str
    """As clients name it."""
    path: str
    """Directory with tokenizer, chat template and generation defaults."""
    max_model_len: int
    block_size: int
    vocab_size: int
    prefix_cache: bool = True
    """Whether workers keep the blocks of finished prompts."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """What happened on the workers before the first token of an attempt. Seconds."""

    queue_seconds: float
    prefill_seconds: float
    prefill_worker: str
    """Empty: the decode worker prefilled the prompt itself."""


@dataclass(frozen=True, slots=True)
class HandoverTimes:
    """How KV came from a prefill worker. What came after the first token is exposed. Seconds."""

    transfer_seconds: float
    exposed_transfer_seconds: float
    kv_bytes: int


class OutputEvent(NamedTuple):
    """Tokens of one request since the event before. At least one token, or a finish reason."""

    token_ids: tuple[int, ...]
    """Includes the token that ended the sequence, if one did (`stop_token_id`)."""
    logprobs: tuple[PositionLogprobs, ...] = ()
    """One per token id where the request asks for them, else empty."""
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    """At most once per request, with the first token: one per prompt token, the first None."""
    finish_reason: FinishReason | None = None
    """Set in the last event only."""
    stop_token_id: int | None = None
    """With finish_reason `stop`: the end-of-sequence or stop token that ended it."""
    cached_tokens: int = 0
    """Prompt tokens that no worker had to compute; known from the first token on."""
    stages: StageTimes | None = None
    """With the first token of an attempt."""
    handover: HandoverTimes | None = None
    """With the first token after KV from a prefill worker was complete."""

    @property
    def is_plain(self) -> bool:
        """Whether nothing but tokens and an end is in it: it may be joined to the event before."""
        return self.stages is None and self.handover is None and self.prompt_logprobs is None


class OutputStream(Protocol):
    """The tokens of one request. Any async generator of `OutputEvent` is one."""

    def __aiter__(self) -> AsyncIterator[OutputEvent]: ...

    async def __anext__(self) -> OutputEvent: ...

    async def aclose(self) -> None:
        """Cancel the request everywhere, unless it is over. Idempotent."""


class Dispatcher(Protocol):
    """Brings requests to workers and their tokens back, across failures of workers."""

    @property
    def ready(self) -> bool:
        """Whether the model is known and at least one decode worker is a member."""

    @property
    def model(self) -> ModelInfo | None:
        """The served model; None until the first membership arrives."""

    @property
    def changes(self) -> Changes:
        """Notified whenever `ready` or `model` may have changed."""

    def generate(self, request: Request) -> OutputStream:
        """Start a request when it is first iterated.

        Iterating raises `OverloadedError`, `UnavailableError`, `DeadlineExceededError` or
        `InvalidRequestError`, before or after the first event.
        """

    async def start(self) -> None:
        """Begin to watch the cluster. Returns at once, whether or not the cluster is there."""

    async def close(self) -> None:
        """End every stream and connection."""


class DispatchObserver(Protocol):
    """What the dispatcher reports for the metrics. Called from the event loop; never blocks."""

    def recovered(self, cause: str) -> None:
        """A request was moved to another worker. `cause` is from a small fixed set."""

    def stale_refused(self, kind: str) -> None:
        """A message stamped with an old incarnation or attempt was dropped."""


class MetricsTarget(NamedTuple):
    """Where Prometheus can scrape one worker."""

    address: str
    worker: str
    role: str


class MetricsTargets(Protocol):
    """Knows where the workers expose their metrics."""

    async def __call__(self) -> list[MetricsTarget]: ...
