"""Waits for every choice of an answer that is not streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tandem.core.request import FinishReason, PositionLogprobs
from tandem.gateway.choices import Choice
from tandem.gateway.http.usage import UsageTally


@dataclass(slots=True)
class Collected:
    """Everything that one choice said."""

    parts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """The text of the choice."""
        return "".join(self.parts)


async def collect(choices: AsyncIterator[Choice], count: int, tally: UsageTally) -> list[Collected]:
    """Return what each of `count` choices said, and count their usage."""
    collected = [Collected() for _ in range(count)]
    async for choice in choices:
        item, event = collected[choice.number], choice.event
        item.parts.append(event.text)
        item.token_ids += event.token_ids
        item.logprobs += event.logprobs
        item.prompt_logprobs = event.prompt_logprobs or item.prompt_logprobs
        if event.usage is not None:
            item.finish_reason, item.stop_reason = event.finish_reason, event.stop_reason
            tally.add(choice.number, event.usage)
    return collected
