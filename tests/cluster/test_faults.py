"""Promise 2: kill or freeze any one worker at any moment; no request fails, no token differs."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable

import pytest

from local_cluster import Connect, LocalCluster, MakeConfig, generate, local_cluster, until_ready
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.gateway.dispatch import Dispatcher

pytestmark = pytest.mark.cluster

REQUESTS = 24
NEW_TOKENS = 60
NO_PREFIXES: dict[str, dict[str, object]] = {
    "cache": {"prefix_cache": False},
    "gateway": {"router": {"policy": "least_loaded"}},
}
"""Every run computes everything again, spread over all workers."""


def make_prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(3, 200) for _ in range(rng.choice([3, 30, 120, 300, 500]))]
        for _ in range(REQUESTS)
    ]


async def run_all(dispatcher: Dispatcher, tag: str, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once: greedy ones, sampled ones, and ones whose past weighs on each draw."""
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    calls = [
        generate(
            dispatcher,
            f"{tag}-{i}",
            prompt,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            temperature=1.0 if i % 2 else 0.0,
            seed=i,
            **(penalties if i % 3 == 0 else {}),
        )
        for i, prompt in enumerate(prompts)
    ]
    return await asyncio.gather(*calls)


async def timed(call: Awaitable[list[list[int]]]) -> tuple[list[list[int]], float]:
    """Return what a run gives and how long it took, to disturb the next one in its middle."""
    began = time.monotonic()
    return await call, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_worker_lost_at_any_moment_changes_no_output(
    victim: str, number: signal.Signals, make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(7)
    config = make_config(**NO_PREFIXES)
    async with (
        local_cluster(config, prefill=2, decode=2) as cluster,
        connect(cluster) as dispatcher,
    ):
        expected, seconds = await timed(run_all(dispatcher, "undisturbed", prompts))
        for moment in (0.0, 0.2, 0.5):
            running = asyncio.create_task(run_all(dispatcher, f"at {moment}", prompts))
            await asyncio.sleep(moment * seconds)
            cluster.workers[victim].signal(number)
            assert await asyncio.wait_for(running, 90) == expected, moment
            await cluster.assert_all_free(set(cluster.workers) - {victim})
            cluster.workers[victim].kill()
            await cluster.add((cluster.workers[victim].role, victim))
            await cluster.publish()
            await until_ready(dispatcher)
        assert dispatcher.in_flight == 0


async def test_what_a_dead_prefill_worker_delivered_is_not_computed_again(
    make_config: MakeConfig, connect: Connect
) -> None:
    """Its successor fetches the kept KV from the decode worker and computes only the rest."""
    prompt = random.Random(12).choices(range(3, 200), k=1000)
    config = make_config(scheduler={"chunk_size": 2}, lending={"mode": "threshold"}, **NO_PREFIXES)
    async with (
        local_cluster(config, prefill=2, decode=1) as cluster,
        connect(cluster) as dispatcher,
    ):
        expected = await generate(dispatcher, "undisturbed", prompt)
        before = {name: await computed_tokens(cluster, name) for name in cluster.workers}
        delivered = await cluster.metric("decode-0", "tandem_worker_kv_bytes_total")
        running = asyncio.create_task(generate(dispatcher, "killed", prompt))
        async with asyncio.timeout(20):
            enough = delivered * 1.2
            while await cluster.metric("decode-0", "tandem_worker_kv_bytes_total") < enough:
                pass
        victim, heir = [name for name in cluster.workers if name.startswith("prefill")]
        if await computed_tokens(cluster, victim) == before[victim]:
            victim, heir = heir, victim
        cluster.workers[victim].kill()
        assert await asyncio.wait_for(running, 60) == expected
        kept = await cluster.metric("decode-0", "tandem_worker_kept_tokens_total")
        computed = await computed_tokens(cluster, heir) - before[heir]
        assert kept > 0
        # One more if the first token had come before the victim died: its KV is then missing too.
        assert computed - (len(prompt) - kept) in (0, 1)
        await cluster.assert_all_free(["decode-0", heir])


async def computed_tokens(cluster: LocalCluster, name: str) -> float:
    return await cluster.metric(name, 'tandem_worker_tokens_total{kind="prefill"')


async def test_the_only_prefill_worker_dies_and_decode_goes_on_alone(
    make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(8)
    async with (
        local_cluster(make_config(**NO_PREFIXES)) as cluster,
        connect(cluster) as dispatcher,
    ):
        expected, seconds = await timed(run_all(dispatcher, "undisturbed", prompts))
        running = asyncio.create_task(run_all(dispatcher, "killed", prompts))
        await asyncio.sleep(0.2 * seconds)
        cluster.workers["prefill-0"].kill()
        assert await asyncio.wait_for(running, 90) == expected
        await cluster.publish(["decode-0"])
        assert await run_all(dispatcher, "without", prompts) == expected
        await cluster.assert_all_free(["decode-0"])


async def test_the_only_decode_worker_dies_and_its_replacement_finishes_the_streams(
    make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(9)
    async with local_cluster(make_config()) as cluster, connect(cluster) as dispatcher:
        expected, seconds = await timed(run_all(dispatcher, "undisturbed", prompts))
        running = asyncio.create_task(run_all(dispatcher, "killed", prompts))
        await asyncio.sleep(0.4 * seconds)
        cluster.workers["decode-0"].kill()
        await cluster.add(("decode", "decode-0"))
        await cluster.publish()
        assert await asyncio.wait_for(running, 90) == expected
        await cluster.assert_all_free()


async def test_a_short_freeze_is_survived_by_everybody(
    make_config: MakeConfig, connect: Connect
) -> None:
    """Long enough to be given up on, then it wakes with stale work and must do no harm."""
    prompts = make_prompts(10)
    config = make_config()
    async with (
        local_cluster(config, prefill=2, decode=2) as cluster,
        connect(cluster) as dispatcher,
    ):
        expected, seconds = await timed(run_all(dispatcher, "undisturbed", prompts))
        for victim in ("decode-0", "prefill-0"):
            running = asyncio.create_task(run_all(dispatcher, victim, prompts))
            await asyncio.sleep(0.2 * seconds)
            cluster.workers[victim].signal(signal.SIGSTOP)
            assert await asyncio.wait_for(running, 90) == expected
            cluster.workers[victim].signal(signal.SIGCONT)
            await cluster.assert_all_free()
            assert await run_all(dispatcher, f"after-{victim}", prompts) == expected


async def test_a_cancelled_request_frees_its_blocks_in_every_window(
    make_config: MakeConfig, connect: Connect
) -> None:
    rng = random.Random(11)
    config = make_config(worker={"heartbeat_interval": 0.1})
    async with local_cluster(config) as cluster, connect(cluster) as dispatcher:

        async def cancel_after(index: int, delay: float) -> None:
            prompt = tuple(rng.randrange(3, 200) for _ in range(400))
            params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
            stream = dispatcher.generate(Request(f"c{index}", prompt, len(prompt), params))
            try:
                async with asyncio.timeout(delay):
                    async for _ in stream:
                        pass
            except TimeoutError:
                pass
            await stream.aclose()

        await asyncio.gather(*(cancel_after(i, 0.005 * i) for i in range(60)))
        await cluster.assert_all_free()
        assert dispatcher.in_flight == 0
