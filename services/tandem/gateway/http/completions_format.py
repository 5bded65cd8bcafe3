"""Completion answers as OpenAI shapes them: chunks of a stream, or the whole."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from tandem.core.request import PositionLogprobs
from tandem.gateway.choices import Choice
from tandem.gateway.http.collect import collect
from tandem.gateway.http.completions_schema import CompletionRequest
from tandem.gateway.http.logprobs import CompletionLogprobs, prompt_logprobs
from tandem.gateway.http.sse import EventTemplate, sse_event
from tandem.gateway.http.usage import UsageTally
from tandem.gateway.model import ServedModel
from tandem.gateway.output import TextEvent


class EchoedPrompt(NamedTuple):
    """A prompt as `echo` repeats it."""

    text: str
    token_ids: tuple[int, ...]


class CompletionWriter:
    """Writes one answer: `n` choices for each prompt, numbered prompt by prompt."""

    def __init__(
        self, model: ServedModel, prompts: Sequence[EchoedPrompt], body: CompletionRequest, n: int
    ) -> None:
        self._tokenizer = model.tokenizer
        self._prompts = prompts
        self._n = n
        self._echo = bool(body.echo)
        self._include_usage = body.include_usage
        self._token_ids = bool(body.return_token_ids)
        self._wants_prompt_logprobs = body.prompt_logprobs is not None
        count = len(prompts) * n
        self._started = [False] * count
        self._templates: list[EventTemplate | None] = [None] * count
        self._logprobs: list[CompletionLogprobs] | None = None
        if body.logprobs is not None:
            self._logprobs = [self._logprobs_writer(index) for index in range(count)]
        self._prompt_logprobs: list[tuple[PositionLogprobs | None, ...] | None]
        self._prompt_logprobs = [None] * len(prompts)
        self._tally = UsageTally(n)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.info.name,
        }

    def events(self, choice: Choice) -> Iterator[bytes]:
        """Return the server-sent event for what a choice says, or none if that is nothing yet."""
        index, event = choice
        if event.finish_reason is None and (template := self._templates[index]) is not None:
            if event.text:
                yield template.event(event.text)
        elif (chunk := self.chunk(choice)) is not None:
            yield sse_event(chunk)
            if event.finish_reason is None and self._logprobs is None and not self._token_ids:
                self._templates[index] = self._template(index)

    def _template(self, index: int) -> EventTemplate:
        """What every later event of a choice looks like, if it is text and nothing else."""
        event = TextEvent(EventTemplate.HOLE, ())
        return EventTemplate(self._chunk(index, event, first=False))

    def chunk(self, choice: Choice) -> dict[str, Any] | None:
        """Return the chunk for one event, or None if there is nothing to say yet."""
        index, event = choice
        if event.usage is not None:
            self._tally.add(index, event.usage)
        first, self._started[index] = not self._started[index], True
        says = event.text or event.finish_reason or self._logprobs or self._token_ids
        if not says and not (first and self._echo):
            return None
        return self._chunk(index, event, first=first)

    def usage_chunk(self) -> dict[str, Any] | None:
        """Return the last chunk, if the client asked for the usage."""
        if not self._include_usage:
            return None
        return {**self._head, "choices": [], "usage": self._tally.as_json()}

    def _chunk(self, index: int, event: TextEvent, *, first: bool) -> dict[str, Any]:
        chunk = {**self._head, "choices": [self._choice(index, event, first=first)]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    async def whole(self, choices: AsyncGenerator[Choice, None]) -> dict[str, Any]:
        """Return the whole answer."""
        async with aclosing(choices):
            collected = await collect(choices, len(self._started), self._tally)
        written = []
        for index, item in enumerate(collected):
            event = TextEvent(
                text=item.text,
                token_ids=tuple(item.token_ids),
                logprobs=tuple(item.logprobs),
                prompt_logprobs=item.prompt_logprobs,
                finish_reason=item.finish_reason,
                stop_reason=item.stop_reason,
            )
            written.append(self._choice(index, event, first=True))
        return {**self._head, "choices": written, "usage": self._tally.as_json()}

    def _choice(self, index: int, event: TextEvent, *, first: bool) -> dict[str, Any]:
        number = index // self._n
        prompt = self._prompts[number]
        if event.prompt_logprobs is not None:
            self._prompt_logprobs[number] = event.prompt_logprobs
        echoes = first and self._echo
        choice: dict[str, Any] = {
            "index": index,
            "text": prompt.text + event.text if echoes else event.text,
            "logprobs": self._logprobs_of(index, event, echoes=echoes),
            "finish_reason": event.finish_reason,
        }
        if event.finish_reason:
            choice["stop_reason"] = event.stop_reason
        if self._wants_prompt_logprobs and first:
            positions = self._prompt_logprobs[number]
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, positions)
        if self._token_ids:
            choice["token_ids"] = event.token_ids
            if first:
                choice["prompt_token_ids"] = prompt.token_ids
        return choice

    def _logprobs_of(self, index: int, event: TextEvent, *, echoes: bool) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        number = index // self._n
        token_ids = event.token_ids
        positions: tuple[PositionLogprobs | None, ...] = event.logprobs
        before = self._prompt_logprobs[number] if echoes else None
        if before is not None:
            token_ids = self._prompts[number].token_ids + token_ids
            positions = (*before, *positions)
        return self._logprobs[index].chunk(token_ids, positions)

    def _logprobs_writer(self, index: int) -> CompletionLogprobs:
        """Offsets count from the start of the choice's text, wherever decoding cut a space."""
        if not self._echo:
            return CompletionLogprobs(self._tokenizer)
        text, token_ids = self._prompts[index // self._n]
        decoded = self._tokenizer.decode(token_ids, continuation=True)
        return CompletionLogprobs(self._tokenizer, len(text) - len(decoded))
