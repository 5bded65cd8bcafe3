"""Prompts and requests that change pools at random moments: the same tokens, nothing leaked."""

from __future__ import annotations

import asyncio
import random
import signal

import pytest

from local_cluster import Connect, LocalCluster, MakeConfig, generate, local_cluster, until_ready
from random_lending import move_at_random
from tandem.core.config import TandemConfig
from tandem.gateway.dispatch import Dispatcher

pytestmark = pytest.mark.cluster

NO_PREFIXES: dict[str, dict[str, object]] = {
    "cache": {"prefix_cache": False},
    "gateway": {"router": {"policy": "least_loaded"}},
}


def make_prompts(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [rng.choice([3, 30, 120, 300, 500]) for _ in range(count)]
    return [rng.choices(range(3, 200), k=length) for length in lengths]


async def learn_costs(cluster: LocalCluster, dispatcher: Dispatcher) -> None:
    """Serve requests one by one until every prefill worker has said what its iterations cost."""
    for i, prompt in enumerate(make_prompts(1, 40)):
        await generate(dispatcher, f"learn-{i}", prompt, max_tokens=2, ignore_eos=True)


async def kept_requests(cluster: LocalCluster) -> float:
    names = [name for name in cluster.workers if name.startswith("prefill")]
    series = "tandem_worker_lent_requests_total"
    return sum([await cluster.metric(name, series) for name in names])


async def run_all(dispatcher: Dispatcher, tag: str, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once, every other one sampled, every third with penalties."""
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5}
    calls = [
        generate(
            dispatcher,
            f"{tag}-{i}",
            prompt,
            max_tokens=40,
            ignore_eos=True,
            temperature=float(i % 2),
            seed=i,
            **(penalties if i % 3 == 0 else {}),
        )
        for i, prompt in enumerate(prompts)
    ]
    return await asyncio.gather(*calls)


async def expected_tokens(
    config: TandemConfig, connect: Connect, prompts: list[list[int]]
) -> list[list[int]]:
    """What one worker that does everything itself gives."""
    worker = config.worker.model_copy(update={"disaggregated": False})
    colocated = config.model_copy(update={"worker": worker})
    async with local_cluster(colocated, prefill=0) as cluster, connect(cluster) as dispatcher:
        return await run_all(dispatcher, "colocated", prompts)


async def moves(cluster: LocalCluster, direction: str) -> float:
    series = f'tandem_worker_moved_prompts_total{{direction="{direction}"'
    names = [name for name in cluster.workers if name.startswith("decode")]
    return sum([await cluster.metric(name, series) for name in names])


async def test_prompts_that_move_at_random_moments_give_the_same_tokens(
    make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(21, 24)
    config = make_config(lending={"max_moves": 6}, **NO_PREFIXES)
    expected = await expected_tokens(config, connect, prompts)
    async with (
        local_cluster(config, prefill=2, decode=2, prepare=move_at_random) as cluster,
        connect(cluster) as dispatcher,
    ):
        for round_ in range(3):
            assert await run_all(dispatcher, f"moved-{round_}", prompts) == expected
            await cluster.assert_all_free()
        assert await moves(cluster, "here") > 0
        assert await moves(cluster, "away") > 0
        assert dispatcher.in_flight == 0


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_worker_killed_while_prompts_move_changes_no_token(
    victim: str, make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(22, 16)
    config = make_config(lending={"max_moves": 6}, **NO_PREFIXES)
    expected = await expected_tokens(config, connect, prompts)
    async with (
        local_cluster(config, prefill=2, decode=2, prepare=move_at_random) as cluster,
        connect(cluster) as dispatcher,
    ):
        assert await run_all(dispatcher, "warm", prompts) == expected
        running = asyncio.create_task(run_all(dispatcher, "killed", prompts))
        before = await moves(cluster, "here")
        async with asyncio.timeout(30):
            while not running.done() and await moves(cluster, "here") == before:
                pass
        cluster.workers[victim].signal(signal.SIGKILL)
        assert await asyncio.wait_for(running, 90) == expected
        await cluster.assert_all_free(set(cluster.workers) - {victim})
        await until_ready(dispatcher)


SHORT_OF_BLOCKS: dict[str, dict[str, object]] = {
    "cache": {"prefix_cache": False, "num_blocks": 160},
    "gateway": {"router": {"policy": "least_loaded"}},
    "lending": {"max_kept": 4},
    "scheduler": {"itl_objective": 60.0},
}
"""A prompt of 500 tokens takes 125 blocks; the objective never stands in the way of keeping."""


async def test_requests_that_prefill_workers_keep_give_the_same_tokens(
    make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(23, 24)
    config = make_config(**SHORT_OF_BLOCKS)
    expected = await expected_tokens(config, connect, prompts)
    async with local_cluster(config, prefill=2) as cluster, connect(cluster) as dispatcher:
        await learn_costs(cluster, dispatcher)
        before = await kept_requests(cluster)
        for round_ in range(2):
            assert await run_all(dispatcher, f"kept-{round_}", prompts) == expected
            await cluster.assert_all_free()
        assert await kept_requests(cluster) > before
        assert dispatcher.in_flight == 0


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_worker_killed_while_requests_are_kept_changes_no_token(
    victim: str, make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(24, 20)
    config = make_config(**SHORT_OF_BLOCKS)
    expected = await expected_tokens(config, connect, prompts)
    async with (
        local_cluster(config, prefill=2, decode=2) as cluster,
        connect(cluster) as dispatcher,
    ):
        await learn_costs(cluster, dispatcher)
        running = asyncio.create_task(run_all(dispatcher, "killed", prompts))
        before = await kept_requests(cluster)
        async with asyncio.timeout(30):
            while not running.done() and await kept_requests(cluster) == before:
                await asyncio.sleep(0)
        cluster.workers[victim].signal(signal.SIGKILL)
        assert await asyncio.wait_for(running, 90) == expected
        await cluster.assert_all_free(set(cluster.workers) - {victim})
        await until_ready(dispatcher)
