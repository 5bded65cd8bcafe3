"""Several completions for one call: `n` of them per prompt, for one prompt or a list.

The choices of a prompt after the first are submitted when the first has its first token: the
prompt is then in the prefix cache, and is computed once. Invariant: when the merged stream ends in
whatever way, every choice's stream is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import NamedTuple

from tandem.core.request import Request
from tandem.gateway.model import ServedModel
from tandem.gateway.output import TextEvent
from tandem.gateway.service import InferenceService

_QUEUE_SIZE = 64


class Choice(NamedTuple):
    """An event of one choice. Choices are numbered prompt by prompt, `n` to each."""

    number: int
    event: TextEvent


def sibling(request: Request, number: int) -> Request:
    """Return the request of choice `number` of a prompt: the same with a seed of its own."""
    if number == 0:
        return request
    seed = (request.sampling.seed + number) % 2**64
    # Prompt logprobs are the same for all: the first choice reports them.
    sampling = replace(request.sampling, seed=seed, prompt_logprobs=None)
    return replace(request, request_id=f"{request.request_id}-{number}", sampling=sampling)


async def run_choices(
    service: InferenceService,
    model: ServedModel,
    prompts: Sequence[Request],
    n: int,
    arrival: float,
) -> AsyncGenerator[Choice, None]:
    """Run `n` choices of each prepared prompt and merge their events as they come.

    The first error ends all of them and is raised.
    """
    if len(prompts) == 1 and n == 1:
        async with aclosing(service.generate(model, prompts[0], arrival)) as events:
            async for event in events:
                yield Choice(0, event)
        return
    merged = _Merge(service, model, arrival)
    try:
        for number, request in enumerate(prompts):
            merged.start_prompt(request, number * n, n)
        remaining = len(prompts) * n
        while remaining:
            choice = await merged.next()
            remaining -= choice.event.finish_reason is not None
            yield choice
    finally:
        await merged.close()


class _Merge:
    """Runs every choice in a task of its own into one bounded queue."""

    def __init__(self, service: InferenceService, model: ServedModel, arrival: float) -> None:
        self._service = service
        self._model = model
        self._arrival = arrival
        self._queue: asyncio.Queue[Choice | BaseException] = asyncio.Queue(_QUEUE_SIZE)
        self._tasks: list[asyncio.Task[None]] = []

    def start_prompt(self, request: Request, index: int, n: int) -> None:
        """Start the first choice of a prompt; the others follow its first token."""
        others = [(sibling(request, number), index + number) for number in range(1, n)]
        self._start(request, index, others)

    async def next(self) -> Choice:
        """Return the next event of any choice, or raise the error of one."""
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    async def close(self) -> None:
        """Cancel what still runs and wait until it is gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, request: Request, index: int, others: list[tuple[Request, int]]) -> None:
        self._tasks.append(asyncio.create_task(self._run(request, index, others)))

    async def _run(self, request: Request, index: int, others: list[tuple[Request, int]]) -> None:
        try:
            async with aclosing(
                self._service.generate(self._model, request, self._arrival)
            ) as events:
                async for event in events:
                    while others:
                        self._start(*others.pop(0), [])
                    await self._queue.put(Choice(index, event))
        except Exception as error:
            await self._queue.put(error)
