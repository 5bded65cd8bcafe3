"""Whole answers of deterministic requests, kept for the next request that asks the very same.

A request that asks what another is being answered joins it: identical requests in flight are
computed once, and each gets the events as they come. Answers belong to a tenant and to a revision
of the model, and are bounded by bytes (the least recently used go first) and by age.

Invariant: the computation behind an entry runs while somebody reads it or until its end, whichever
is first; an answer that failed or was left by its last reader is never kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from typing import Literal

import orjson

from tandem.core.request import Request
from tandem.gateway.metrics import GatewayMetrics
from tandem.gateway.model import ServedModel
from tandem.gateway.output import TextEvent

_EVENT_BYTES = 256
"""What an event takes beside its contents, about; a log-probability takes a fifth of it."""

Compute = Callable[[], AsyncGenerator[TextEvent, None]]


def answer_key(model: ServedModel, request: Request) -> bytes:
    """Return what two requests have in common exactly when one's answer is the other's.

    A greedy request's seed is left out: nothing is drawn with it.
    """
    sampling = {f.name: getattr(request.sampling, f.name) for f in fields(request.sampling)}
    sampling["logit_bias"] = dict(request.sampling.logit_bias)
    if request.sampling.greedy:
        sampling["seed"] = 0
    parts = [
        model.info.name,
        model.revision,
        request.tenant,
        request.cache_salt,
        request.token_ids,
        sampling,
    ]
    options = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    return hashlib.sha256(orjson.dumps(parts, option=options)).digest()


@dataclass(eq=False, slots=True)
class _Entry:
    """One answer, complete or in the making."""

    events: list[TextEvent] = field(default_factory=list)
    num_bytes: int = 0
    readers: int = 0
    expires_at: float | None = None
    """None while it is in the making."""
    error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def counted(self) -> bool:
        """Whether it is complete: it has an age, and its bytes count."""
        return self.expires_at is not None

    def wake(self) -> None:
        """Let every reader look again."""
        self.changed.set()
        self.changed = asyncio.Event()


class ResponseCache:
    """`stream` either replays an answer, joins one in the making, or computes and keeps it."""

    def __init__(
        self,
        max_bytes: int,
        ttl: float,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ttl`: seconds for which a complete answer is good."""
        self._max_bytes = max_bytes
        self._ttl = ttl
        self._metrics = metrics
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """About what the complete answers take."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    async def stream(self, key: bytes, compute: Compute) -> AsyncGenerator[TextEvent, None]:
        """Yield the answer; its first event says whether it was a `hit` or a `miss`.

        Raises what `compute` raises, to everyone who reads that answer.
        """
        entry = self._usable(key)
        result: Literal["hit", "miss"] = "miss" if entry is None else "hit"
        self._metrics.response_cache_lookup(result)
        if entry is None:
            entry = self._entries[key] = _Entry()
            entry.task = asyncio.create_task(self._fill(key, entry, compute))
        entry.readers += 1
        try:
            async with aclosing(_read(entry)) as events:
                yield (await anext(events))._replace(cache=result)
                async for event in events:
                    yield event
        finally:
            entry.readers -= 1
            if not entry.readers and not entry.counted:
                await self._abandon(key, entry)

    def _usable(self, key: bytes) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_at is not None and entry.expires_at <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    async def _fill(self, key: bytes, entry: _Entry, compute: Compute) -> None:
        try:
            async with aclosing(compute()) as events:
                async for event in events:
                    entry.events.append(event)
                    entry.num_bytes += _size(event)
                    entry.wake()
        except Exception as error:
            entry.error = error
            self._forget(key, entry)
        else:
            self._keep(key, entry)
        entry.wake()

    def _keep(self, key: bytes, entry: _Entry) -> None:
        entry.expires_at = self._clock() + self._ttl
        if entry.num_bytes > self._max_bytes:
            self._forget(key, entry)
            return
        self._num_bytes += entry.num_bytes
        while self._num_bytes > self._max_bytes:
            self._drop(next(k for k, e in self._entries.items() if e is not entry and e.counted))
        self._metrics.response_cache_holds(self._num_bytes)

    def _drop(self, key: bytes) -> None:
        """Remove a complete answer. Who reads it still has it."""
        self._num_bytes -= self._entries.pop(key).num_bytes
        self._metrics.response_cache_holds(self._num_bytes)

    def _forget(self, key: bytes, entry: _Entry) -> None:
        """Remove an answer that was never counted."""
        if self._entries.get(key) is entry:
            del self._entries[key]

    async def _abandon(self, key: bytes, entry: _Entry) -> None:
        """End a computation that nobody waits for."""
        self._forget(key, entry)
        if entry.task is not None:
            entry.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await entry.task


async def _read(entry: _Entry) -> AsyncGenerator[TextEvent, None]:
    position = 0
    while True:
        changed = entry.changed
        while position < len(entry.events):
            yield entry.events[position]
            position += 1
        if entry.error is not None:
            raise entry.error
        if entry.counted:
            return
        if changed is entry.changed:
            await changed.wait()


def _size(event: TextEvent) -> int:
    positions = [*event.logprobs, *(event.prompt_logprobs or ())]
    alternatives = sum(1 + len(position.top) for position in positions if position is not None)
    return _EVENT_BYTES + 4 * len(event.text) + 8 * len(event.token_ids) + 50 * alternatives
