"""From output events to text: detokenizer and stop strings of one stream.

Invariant: what comes out depends on the tokens alone, not on how they are grouped into events, so
that a stream that was resumed elsewhere reads the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from tandem.core.request import FinishReason, PositionLogprobs
from tandem.core.sampling import SamplingParams
from tandem.gateway.interfaces import OutputEvent
from tandem.gateway.text.detokenizer import IncrementalDetokenizer
from tandem.gateway.text.stop_strings import StopStringMatcher
from tandem.gateway.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that one stream took."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class TextEvent(NamedTuple):
    """What one stream has to say since the event before."""

    text: str
    """Empty while what was generated may still become a stop string or half a character."""
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    """Set in the last event only, as are `stop_reason` and `usage`."""
    stop_reason: str | int | None = None
    """The stop string or stop token id of the request that ended it; None for end of sequence."""
    usage: Usage | None = None
    cache: Literal["hit", "miss"] | None = None
    """In the first event, where there is a response cache: whether the answer came from it."""


class OutputAssembler:
    """Turns the output events of one request into text events."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_len: int) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stops = StopStringMatcher(
            sampling.stop, include_stop=sampling.include_stop_str_in_output
        )
        self._sampling = sampling
        self._watches_stops = bool(sampling.stop)
        self._prompt_len = prompt_len
        self._num_tokens = 0
        self._cached_tokens = 0

    def feed(self, event: OutputEvent) -> TextEvent:
        """Return what an event adds. After one with a `finish_reason` there is nothing to come.

        A stop string ends the stream at the token that completes it; tokens after that one are
        dropped, whatever the worker's own finish reason is.
        """
        self._cached_tokens = event.cached_tokens or self._cached_tokens
        text, count, stop = self._consume(event)
        finish_reason = event.finish_reason
        stop_reason: str | int | None = self._worker_stop_reason(event)
        if stop is not None:
            finish_reason, stop_reason = "stop", stop
        return TextEvent(
            text=text,
            token_ids=event.token_ids[:count],
            logprobs=event.logprobs[:count],
            prompt_logprobs=event.prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            usage=self._usage() if finish_reason else None,
        )

    def _consume(self, event: OutputEvent) -> tuple[str, int, str | None]:
        """Return the text, how many tokens it took, and the stop string that was found."""
        parts = []
        last = len(event.token_ids)
        for count, token_id in enumerate(event.token_ids, start=1):
            self._num_tokens += 1
            ends_it = count == last and self._is_stop_token(event, token_id)
            if ends_it and not self._sampling.include_stop_str_in_output:
                continue
            text = self._detokenizer.push(token_id)
            if self._watches_stops:
                text, stop = self._filter(text)
                if stop is not None:
                    parts.append(text)
                    return "".join(parts), count, stop
            parts.append(text)
        if event.finish_reason is not None:
            text, stop = self._filter(self._detokenizer.flush())
            parts += [text, self._stops.flush()]
            return "".join(parts), last, stop
        return "".join(parts), last, None

    def _filter(self, text: str) -> tuple[str, str | None]:
        """Before `min_tokens` are there, nothing counts as a stop string."""
        if not text or self._num_tokens < self._sampling.min_tokens:
            return text, None
        return self._stops.push(text)

    @staticmethod
    def _is_stop_token(event: OutputEvent, token_id: int) -> bool:
        return event.finish_reason == "stop" and token_id == event.stop_token_id

    def _worker_stop_reason(self, event: OutputEvent) -> int | None:
        token_id = event.stop_token_id
        stopped = event.finish_reason == "stop"
        return token_id if stopped and token_id in self._sampling.stop_token_ids else None

    def _usage(self) -> Usage:
        return Usage(self._prompt_len, self._num_tokens, self._cached_tokens)
