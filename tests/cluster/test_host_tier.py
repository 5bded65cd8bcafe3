"""KV goes to host memory and comes back through the whole cluster, and no token changes."""

from __future__ import annotations

import asyncio
import random

import pytest

from local_cluster import Connect, LocalCluster, MakeConfig, generate, local_cluster
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.gateway.dispatch import Dispatcher

pytestmark = pytest.mark.cluster

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "ignore_eos": True}


async def crowd(dispatcher: Dispatcher, name: str, max_tokens: int = 80) -> list[list[int]]:
    """Eight requests at once, each of which alone would fit easily."""
    rng = random.Random(5)
    prompts = [[rng.randrange(5, 200) for _ in range(rng.randrange(3, 90))] for _ in range(8)]
    lengths = [max_tokens - 9 * (i % 3) for i in range(8)]
    async with asyncio.timeout(60):
        return await asyncio.gather(
            *(
                generate(dispatcher, f"{name}{i}", prompt, seed=i, max_tokens=length, **SAMPLING)
                for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
            )
        )


async def assert_host_free(cluster: LocalCluster) -> None:
    await cluster.assert_all_free()
    for name in cluster.workers:
        async with asyncio.timeout(20):
            while (await cluster.status(name)).host_blocks_used:
                await asyncio.sleep(0.02)


async def test_the_same_tokens_whichever_way_sequences_are_preempted(
    make_config: MakeConfig, connect: Connect
) -> None:
    async with local_cluster(make_config()) as cluster, connect(cluster) as dispatcher:
        expected = await crowd(dispatcher, "r")
    for way in ("swap", "refill", "wait", "auto"):
        for overlap in ("off", "on"):
            config = make_config(
                scheduler={"preemption": way, "overlap": overlap}, cache={"num_blocks": 64}
            )
            async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
                assert await crowd(dispatcher, "r") == expected, (way, overlap)
                await assert_host_free(cluster)
                status = await cluster.status("decode-0")
                happened = dict(status.preemptions)
                assert sum(happened.values()) > 0
                if way in ("swap", "refill"):
                    assert set(happened) == {way}
                if way == "swap":
                    copied = status.host_blocks_copied
                    assert 0 < copied["swap_in"] <= copied["swap_out"]


async def test_a_prefix_that_the_device_has_evicted_is_copied_back(
    make_config: MakeConfig, connect: Connect
) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(5, 200) for _ in range(80)] for _ in range(6)]
    for disaggregated in (False, True):
        config = make_config(
            worker={"disaggregated": disaggregated},
            cache={"num_blocks": 48, "host_memory_bytes": 4 * 2**20},
        )
        async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
            rounds = [
                [
                    await generate(dispatcher, f"{turn}-{i}", prompt, seed=i, **SAMPLING)
                    for i, prompt in enumerate(prompts)
                ]
                for turn in range(2)
            ]
            assert rounds[0] == rounds[1]
            await assert_host_free(cluster)
            copied = (await cluster.status("decode-0")).host_blocks_copied
            assert copied["spill"] > 0
            assert copied["restore"] > 0
            prefill = (await cluster.status("prefill-0")).host_blocks_copied
            assert (prefill["spill"] > 0) == disaggregated


async def test_readers_that_go_away_while_kv_is_copied_leave_nothing(
    make_config: MakeConfig, connect: Connect
) -> None:
    rng = random.Random(3)
    config = make_config(
        scheduler={"preemption": "swap"},
        cache={"num_blocks": 64, "host_memory_bytes": 4 * 2**20},
    )
    async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
        expected = await crowd(dispatcher, "alone")

        async def go_away(name: str, length: int, after: int) -> None:
            prompt = tuple(range(5, 5 + length))
            params = SamplingParams(max_tokens=90, temperature=1.0, ignore_eos=True)
            stream = dispatcher.generate(Request(name, prompt, length, params))
            async for _ in stream:
                after -= 1
                if after <= 0:
                    break
            await stream.aclose()  # type: ignore[attr-defined]

        for turn in range(3):
            leaving = [
                go_away(f"c{turn}-{i}", rng.randrange(20, 80), rng.randrange(1, 60))
                for i in range(6)
            ]
            staying, *_ = await asyncio.gather(crowd(dispatcher, f"s{turn}-"), *leaving)
            assert staying == expected
        await assert_host_free(cluster)
        assert (await cluster.status("decode-0")).preemptions["swap"] > 0


async def test_a_decode_worker_killed_while_sequences_are_swapped_out_loses_no_token(
    make_config: MakeConfig, connect: Connect
) -> None:
    async with local_cluster(make_config()) as cluster, connect(cluster) as dispatcher:
        expected = await crowd(dispatcher, "r")
    config = make_config(scheduler={"preemption": "swap"}, cache={"num_blocks": 48})
    async with local_cluster(config, decode=2) as cluster, connect(cluster) as dispatcher:
        outputs = asyncio.create_task(crowd(dispatcher, "r"))
        async with asyncio.timeout(30):
            while not (await cluster.status("decode-0")).host_blocks_used:
                await asyncio.sleep(0.005)
        cluster.workers["decode-0"].kill()
        assert await outputs == expected
        del cluster.workers["decode-0"]
        await assert_host_free(cluster)
