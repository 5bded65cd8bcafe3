"""Events on their way to their consumer: none lost, none twice, in order, woken together."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.errors import UnavailableError
from tandem.core.request import PositionLogprobs, TokenLogprob
from tandem.gateway.dispatch.mailbox import Item, Mailbox, Wakeups
from tandem.gateway.interfaces import OutputEvent, StageTimes

STAGES = StageTimes(0.1, 0.2, "prefill-0")


def logprobs(token_id: int) -> PositionLogprobs:
    return PositionLogprobs(TokenLogprob(token_id, -1.0, 1), ())


async def drain(mailbox: Mailbox) -> list[Item]:
    """Read until the end is read."""
    items: list[Item] = []
    while True:
        item = await mailbox.get()
        items.append(item)
        if item is None:
            return items


async def test_tokens_that_came_together_leave_together() -> None:
    mailbox = Mailbox(Wakeups())
    mailbox.put(OutputEvent((1,), (logprobs(1),), stages=STAGES))
    mailbox.put(OutputEvent((2, 3), (logprobs(2), logprobs(3)), cached_tokens=5))
    mailbox.put(OutputEvent((4,), (logprobs(4),), finish_reason="stop", stop_token_id=4))
    expected = tuple(logprobs(token_id) for token_id in (1, 2, 3, 4))
    assert await mailbox.get() == OutputEvent(
        (1, 2, 3, 4), expected, None, "stop", 4, cached_tokens=0, stages=STAGES
    )


async def test_what_happened_on_the_workers_is_never_joined_away() -> None:
    mailbox = Mailbox(Wakeups())
    moved = OutputEvent((3,), stages=StageTimes(0.3, 0.4, "prefill-1"))
    error = UnavailableError("gone")
    for item in (OutputEvent((1,), stages=STAGES), OutputEvent((2,)), moved, error, None):
        mailbox.put(item)
    assert await drain(mailbox) == [OutputEvent((1, 2), stages=STAGES), moved, error, None]


@given(st.lists(st.integers(1, 4), max_size=30), st.lists(st.booleans(), min_size=30, max_size=30))
def test_every_token_comes_out_once_and_in_order(groups: list[int], pauses: list[bool]) -> None:
    async def run() -> list[int]:
        mailbox = Mailbox(Wakeups())
        reader = asyncio.create_task(drain(mailbox))
        number = 0
        for size, pause in zip(groups, pauses, strict=False):
            mailbox.put(OutputEvent(tuple(range(number, number + size))))
            number += size
            if pause:
                await asyncio.sleep(0)
        mailbox.put(None)
        items = await asyncio.wait_for(reader, 10)
        return [token for item in items if isinstance(item, OutputEvent) for token in item[0]]

    assert asyncio.run(run()) == list(range(sum(groups)))


async def test_a_consumer_that_is_cancelled_leaves_what_came_for_the_next() -> None:
    mailbox = Mailbox(Wakeups())
    reader = asyncio.create_task(mailbox.get())
    await asyncio.sleep(0)
    mailbox.put(OutputEvent((1,)))
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert await asyncio.wait_for(mailbox.get(), 10) == OutputEvent((1,))


async def test_after_a_burst_follows_a_pause_half_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    loop = asyncio.get_running_loop()
    delays: list[float] = []
    real = loop.call_later

    def call_later(delay, callback, *args):
        delays.append(delay)
        return real(0, callback, *args)

    monkeypatch.setattr(loop, "call_later", call_later)
    wakeups = Wakeups()
    mailboxes = [Mailbox(wakeups) for _ in range(3)]

    async def slow(mailbox: Mailbox) -> None:
        for _ in range(2):
            await mailbox.get()
            now[0] += 0.25  # what each consumer takes

    tasks = [asyncio.create_task(slow(mailbox)) for mailbox in mailboxes]
    await asyncio.sleep(0)
    for mailbox in mailboxes:
        mailbox.put(OutputEvent((1,)))
    while now[0] < 100.75:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert delays == []
    for mailbox in mailboxes:
        mailbox.put(OutputEvent((2,)))
    await asyncio.gather(*tasks)
    assert delays == [pytest.approx(0.375)]
