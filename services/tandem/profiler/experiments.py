"""The experiments: lone prompts, and batches that decode alone or beside a prompt."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tandem.core.config import TandemConfig
from tandem.core.errors import ConfigError
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.profiler.stream import Endpoint, Stream, complete
from tandem.scheduler import PoolRole, Scheduler, make_policy
from tandem.scheduler.costs import Work, work_of

FEWEST_STEPS, MOST_STEPS, _SECONDS = 24, 400, 1.5
"""A batch decodes for so long: at least so many steps, and not more than so many or so long."""


class Prompts:
    """Prompts that share no prefix, so that no cache helps."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rng = random.Random()  # another profile of this cluster must not find these cached

    def draw(self, length: int) -> list[int]:
        """Return the next prompt."""
        return [self._rng.randrange(self._vocab_size) for _ in range(length)]


def lone_iterations(config: TandemConfig, role: PoolRole, length: int) -> tuple[Work, ...]:
    """Return the iterations that the real scheduler makes of one prompt that is alone.

    Raises `ConfigError` for a policy that lets a lone prompt wait.
    """
    block_size = config.cache.block_size
    pool = BlockPool(length // block_size + 2, block_size, prefix_cache=False)
    policy = make_policy(config.scheduler, role)
    scheduler = Scheduler(config.scheduler, pool, length + 2, policy)
    request = Request("lone", (0,) * length, length, SamplingParams(max_tokens=1))
    sequence = Sequence(request, 0)
    scheduler.add(sequence)
    works = []
    while sequence.num_uncomputed:
        plan = scheduler.schedule(0.0)
        if not plan.chunks:
            raise ConfigError("the scheduling policy lets a lone prompt wait: profile with another")
        works.append(work_of(plan.chunks))
        scheduler.advance(plan)
    return tuple(works)


@dataclass(frozen=True)
class Batch:
    """A batch that decoded for a while. `gaps` are seconds between tokens of each stream."""

    work: Work
    """Of the iteration in the middle."""
    gaps: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Seconds of one of its iterations."""
        return sum(self.gaps) / len(self.gaps)


async def decode_batch(
    endpoint: Endpoint,
    prompts: list[list[int]],
    most_tokens: int,
    beside: Callable[[], Awaitable[None]] | None = None,
) -> Batch:
    """Decode `prompts` together for a while from when the last one began, or until `beside`, which
    runs from then on, has ended; then drop them."""
    streams = [Stream() for _ in prompts]
    heard = asyncio.Event()
    tasks = [
        asyncio.create_task(complete(endpoint, prompt, most_tokens, stream, heard.set))
        for prompt, stream in zip(prompts, streams, strict=True)
    ]
    try:
        await _until(lambda: all(stream.tokens for stream in streams), heard, tasks)
        begins = [len(stream.tokens) for stream in streams]
        if beside is not None:
            await beside()
        else:
            pairs = list(zip(streams, begins, strict=True))
            await _until(lambda: all(_is_enough(s.tokens[b:]) for s, b in pairs), heard, tasks)
        return _between(prompts, streams, begins)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_enough(times: list[float]) -> bool:
    """Tokens may come in bursts, so a mean needs some of them and some time."""
    if len(times) < FEWEST_STEPS:
        return False
    return len(times) >= MOST_STEPS or times[-1] - times[0] >= _SECONDS


async def _until(
    enough: Callable[[], bool], heard: asyncio.Event, tasks: list[asyncio.Task[Stream]]
) -> None:
    """Wait for tokens until they are enough, or until a stream ends, well or not."""
    while not enough():
        for task in tasks:
            if task.done():
                task.result()
                return
        heard.clear()
        await heard.wait()


def _between(prompts: list[list[int]], streams: list[Stream], begins: list[int]) -> Batch:
    """Keep the gaps after each stream's first `begins` tokens, but for the one that these end with:
    the last prompt may have been computed in it."""
    gaps: list[float] = []
    context = 0.0
    for prompt, stream, begin in zip(prompts, streams, begins, strict=True):
        times = stream.tokens
        gaps += [times[i] - times[i - 1] for i in range(begin + 1, len(times))]
        context += len(prompt) + (begin + len(times)) / 2
    return Batch(Work(decodes=len(prompts), context=round(context)), tuple(gaps))
