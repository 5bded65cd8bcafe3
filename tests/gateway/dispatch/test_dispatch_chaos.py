"""Many streams; workers die, freeze, come back; consumers leave: exact, and without leaks."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

NUM_REQUESTS = 200
ARRIVAL_SECONDS = 4.0

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def trouble(cluster, rng: random.Random, tools) -> None:
    """Kill a random worker or freeze the busiest, and replace it, again and again; at most one is
    missing."""
    for number in itertools.count(1):
        await asyncio.sleep(rng.uniform(0.02, 0.1))
        name = rng.choice(sorted(cluster.workers))
        victim = cluster.workers[name]
        if number % 6 == 0:
            await tools.eventually(lambda: any(each.active for each in cluster.workers.values()))
            victim = max(cluster.workers.values(), key=lambda each: len(each.active))
            name = victim.name
            victim.freeze()
            await tools.eventually(lambda name=name: name not in cluster.dispatcher._pool.accepting)
        else:
            await victim.die()
        await cluster.replace(name)
        await cluster.publish()
        heir = cluster.workers[name]
        await tools.eventually(lambda heir=heir: heir.hellos > 0)


async def consume(cluster, request, rng: random.Random, tools) -> str:
    """Read one stream to its end, or leave somewhere in it; say which."""
    await asyncio.sleep(rng.uniform(0, ARRIVAL_SECONDS))
    stream = cluster.dispatcher.generate(request)
    expected = tools.expected(request)
    if rng.random() < 0.3:
        count = rng.randrange(len(expected))
        taken = await tools.take(stream, count)
        await stream.aclose()
        assert taken == expected[: len(taken)]
        return "left"
    assert await tools.collect(stream) == expected
    return "finished"


@pytest.mark.parametrize("seed", [1, 2])
async def test_streams_are_exact_under_random_failures(cluster, make_request, tools, seed) -> None:
    rng = random.Random(seed)
    dispatcher = await cluster.start(
        decode=4, prefill=2, worker_timeout=1.0, max_attempts=1000, no_worker_timeout=20.0
    )
    requests = [
        make_request(
            max_tokens=rng.randrange(1, 120),
            prompt=tuple(rng.randrange(1000) for _ in range(rng.randrange(1, 30))),
            name=f"req-{index}",
        )
        for index in range(NUM_REQUESTS)
    ]
    chaos = asyncio.create_task(trouble(cluster, rng, tools))
    ends = await asyncio.wait_for(
        asyncio.gather(*(consume(cluster, request, rng, tools) for request in requests)), 60
    )
    chaos.cancel()
    await asyncio.gather(chaos, return_exceptions=True)
    assert set(ends) == {"left", "finished"}
    assert set(cluster.observer.recoveries) == {"decode_lost", "decode_frozen"}
    await cluster.assert_nothing_is_held()
    assert len(dispatcher._traffic._parking) == 0
