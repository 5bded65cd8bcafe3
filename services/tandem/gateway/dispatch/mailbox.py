"""What a request has for its consumer, between the message that brought it and the consumer's task.

Knows no requests and no workers. Invariant: what is put in comes out once and in order; tokens that
came while the consumer was busy come out as one event.

Waking a task for a token costs more than the token, so consumers are woken together and never more
than two thirds of the time: a burst that took t seconds is followed by a pause of t / 2. With
time to spare the pause is over before the next token comes; under load several tokens leave in one
event, and the cost of a token falls.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from tandem.core.errors import TandemError
from tandem.gateway.interfaces import OutputEvent

PAUSE = 0.5
"""Seconds of rest for each second that a burst took."""
Item = OutputEvent | TandemError | None


class Wakeups:
    """The mailboxes of one event loop whose consumers are to be woken."""

    def __init__(self) -> None:
        self._due: list[Mailbox] = []
        self._not_before = 0.0

    def add(self, mailbox: Mailbox) -> None:
        """Wake this consumer with the next burst."""
        if not self._due:
            loop = asyncio.get_running_loop()
            pause = self._not_before - time.perf_counter()
            if pause > 0:
                loop.call_later(pause, self._burst)
            else:
                loop.call_soon(self._burst)
        self._due.append(mailbox)

    def _burst(self) -> None:
        start = time.perf_counter()
        due, self._due = self._due, []
        for mailbox in due:
            mailbox.wake()
        asyncio.get_running_loop().call_soon(self._done, start)  # behind every task just woken

    def _done(self, start: float) -> None:
        now = time.perf_counter()
        self._not_before = now + (now - start) * PAUSE


class Mailbox:
    """Events of one request; one consumer waits at a time."""

    def __init__(self, wakeups: Wakeups) -> None:
        self._wakeups = wakeups
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """Append an event, an error to raise, or None for the end."""
        if self._waiter is not None and not self._items:
            self._wakeups.add(self)
        self._items.append(item)

    def wake(self) -> None:
        """Let the consumer go on, if one waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Item:
        """Return what comes next; plain tokens that have collected come as one event."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._items.popleft()
        if self._items and isinstance(item, OutputEvent):
            return self._with_followers(item)
        return item

    def _with_followers(self, event: OutputEvent) -> OutputEvent:
        token_ids, logprobs, last = [*event.token_ids], [*event.logprobs], event
        while self._items:
            follower = self._items[0]
            if not isinstance(follower, OutputEvent) or not follower.is_plain:
                break
            self._items.popleft()
            token_ids += follower.token_ids
            logprobs += follower.logprobs
            last = follower
        return event._replace(
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            finish_reason=last.finish_reason,
            stop_token_id=last.stop_token_id,
            cached_tokens=last.cached_tokens,
        )
