"""Gateways know what prefill workers hold: what was evicted, and what others had computed."""

from __future__ import annotations

import asyncio
import random

import pytest

from local_cluster import Connect, MakeConfig, local_cluster
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.gateway.dispatch import Dispatcher
from tandem.kvcache.hashing import chain_hashes
from tandem.router.prefix_view import keys_of

pytestmark = pytest.mark.cluster

PREFILL = {"prefill-0", "prefill-1"}
BLOCK = 4


class Gateway:
    """A gateway and what its router believes."""

    def __init__(self, dispatcher: Dispatcher, name: str) -> None:
        self._dispatcher, self._name, self._sent = dispatcher, name, 0

    async def send(self, prompt: list[int], avoid: set[str] = frozenset()) -> str:
        """Run a prompt; return who prefilled it. `avoid`: prefill workers that are mistrusted."""
        routing = self._dispatcher._routing
        for name in avoid:
            member = routing.membership.prefill[name]
            routing._suspects.add(member, asyncio.get_running_loop().time())
        self._sent += 1
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        request = Request(f"{self._name}{self._sent}", tuple(prompt), len(prompt), sampling)
        events = [event async for event in self._dispatcher.generate(request)]
        routing._suspects.keep({})
        stages = events[0].stages
        assert stages is not None
        return stages.prefill_worker

    def believes(self, worker: str, prompt: list[int]) -> int:
        """Tokens of the prompt that a prefill worker should have cached."""
        pool = self._dispatcher._routing._router._prefill
        keys = keys_of(chain_hashes(prompt, BLOCK))
        return BLOCK * int(pool._prefixes.match(pool.get(worker).number, keys))

    async def learns(self, worker: str, prompt: list[int], tokens: int) -> None:
        async with asyncio.timeout(20):
            while self.believes(worker, prompt) != tokens:
                await asyncio.sleep(0.01)


async def test_evicted_prefixes_are_not_looked_for_and_those_of_other_gateways_are_found(
    make_config: MakeConfig, connect: Connect
) -> None:
    rng = random.Random(3)

    def words(number: int) -> list[int]:
        return [rng.randrange(5, 200) for _ in range(number)]

    shared = words(80)
    config = make_config(
        worker={"local_prefill_max_tokens": 0},
        lending={"mode": "threshold"},
        cache={"num_blocks": 64},
    )
    async with (
        local_cluster(config, prefill=2) as cluster,
        connect(cluster) as first,
        connect(cluster) as second,
    ):
        one, two = Gateway(first, "one"), Gateway(second, "two")
        holder = await one.send(shared)
        (other,) = PREFILL - {holder}
        await two.learns(holder, shared, 80)
        for _ in range(4):
            assert await two.send(shared + words(9)) == holder

        for _ in range(4):  # 64 blocks have no room for four other prompts and this one
            assert await one.send(words(80), avoid={other}) == holder
        await one.learns(holder, shared, 0)
        await two.learns(holder, shared, 0)

        assert await two.send(shared, avoid={holder}) == other
        await one.learns(other, shared, 80)
        for _ in range(4):
            assert await one.send(shared + words(9)) == other
