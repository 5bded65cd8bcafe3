"""Chat answers as OpenAI shapes them: chunks of a stream, or the whole."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from tandem.core.request import Request
from tandem.gateway.choices import Choice
from tandem.gateway.http.chat_schema import ChatRequest
from tandem.gateway.http.collect import Collected, collect
from tandem.gateway.http.logprobs import chat_logprobs, prompt_logprobs
from tandem.gateway.http.sse import EventTemplate, sse_event
from tandem.gateway.http.usage import UsageTally
from tandem.gateway.model import ServedModel
from tandem.gateway.output import TextEvent


class ChatWriter:
    """Writes one answer."""

    def __init__(self, model: ServedModel, prompt: Request, body: ChatRequest, n: int) -> None:
        self._tokenizer = model.tokenizer
        self._prompt = prompt
        self._include_usage = body.include_usage
        self._token_ids = bool(body.return_token_ids)
        self._logprobs = prompt.sampling.logprobs is not None
        self._started = [False] * n
        self._templates: list[EventTemplate | None] = [None] * n
        self._tally = UsageTally(n)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model.info.name,
        }

    def events(self, choice: Choice) -> Iterator[bytes]:
        """Return the server-sent events for what a choice says."""
        index, event = choice
        if event.finish_reason is None and (template := self._templates[index]) is not None:
            if event.text:
                yield template.event(event.text)
            return
        for chunk in self.chunks(choice):
            yield sse_event(chunk)
        if event.finish_reason is None and not self._logprobs and not self._token_ids:
            self._templates[index] = self._template(index)

    def _template(self, index: int) -> EventTemplate:
        """What every later event of a choice looks like, if it is text and nothing else."""
        event = TextEvent(EventTemplate.HOLE, ())
        return EventTemplate(self._chunk(self._delta_choice(index, event)))

    def chunks(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """Return the chunks for one event: first the role, then whatever there is to say."""
        index, event = choice
        if event.usage is not None:
            self._tally.add(index, event.usage)
        if not self._started[index]:
            self._started[index] = True
            yield self._role_chunk(index, event)
        if event.text or event.finish_reason or self._logprobs or self._token_ids:
            yield self._chunk(self._delta_choice(index, event))

    def usage_chunk(self) -> dict[str, Any] | None:
        """Return the last chunk, if the client asked for the usage."""
        if not self._include_usage:
            return None
        return {**self._head, "choices": [], "usage": self._tally.as_json()}

    async def whole(self, choices: AsyncGenerator[Choice, None]) -> dict[str, Any]:
        """Return the whole answer."""
        async with aclosing(choices):
            collected = await collect(choices, len(self._started), self._tally)
        answer = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._message_choice(index, item) for index, item in enumerate(collected)],
            "usage": self._tally.as_json(),
        }
        if self._prompt.sampling.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, collected[0].prompt_logprobs
            )
        if self._token_ids:
            answer["prompt_token_ids"] = self._prompt.token_ids
        return answer

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk

    def _role_chunk(self, index: int, event: TextEvent) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        chunk = self._chunk(
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        )
        if event.prompt_logprobs is not None:
            chunk["prompt_logprobs"] = prompt_logprobs(self._tokenizer, event.prompt_logprobs)
        if self._token_ids:
            chunk["prompt_token_ids"] = self._prompt.token_ids
        return chunk

    def _delta_choice(self, index: int, event: TextEvent) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": chat_logprobs(self._tokenizer, event.logprobs) if self._logprobs else None,
            "finish_reason": event.finish_reason,
        }
        if event.finish_reason:
            choice["stop_reason"] = event.stop_reason
        if self._token_ids:
            choice["token_ids"] = event.token_ids
        return choice

    def _message_choice(self, index: int, item: Collected) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": item.text, "refusal": None},
            "logprobs": chat_logprobs(self._tokenizer, item.logprobs) if self._logprobs else None,
            "finish_reason": item.finish_reason,
            "stop_reason": item.stop_reason,
        }
        if self._token_ids:
            choice["token_ids"] = item.token_ids
        return choice
