"""Workers of several ranks: the same tokens over unequal degrees, and any lost rank is survived."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from tests.cluster.test_equality import random_prompts, reference_tokens
from tests.cluster.test_faults import NO_PREFIXES, make_prompts, run_all, timed

from local_cluster import Connect, MakeConfig, generate, local_cluster, until_ready
from tiny_models import make_tiny_model

pytestmark = pytest.mark.cluster


def degrees(prefill: int, decode: int) -> dict[str, dict[str, object]]:
    return {"prefill": {"tensor_parallel": prefill}, "decode": {"tensor_parallel": decode}}


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (2, 2)])
async def test_greedy_tokens_equal_transformers_whatever_the_degrees(
    prefill: int, decode: int, tiny_llama: Path, make_config: MakeConfig, connect: Connect
) -> None:
    prompts = random_prompts(1, [1, 5, 16, 17, 33, 70])
    expected = reference_tokens(tiny_llama, prompts, 12)
    config = make_config(**degrees(prefill, decode))
    async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
        assert (await cluster.status("prefill-0")).tensor_parallel == prefill
        assert (await cluster.status("decode-0")).tensor_parallel == decode
        for round_ in ("cold", "prefix hits"):
            calls = [
                generate(dispatcher, f"{round_}-{i}", prompt, max_tokens=12, ignore_eos=True)
                for i, prompt in enumerate(prompts)
            ]
            assert await asyncio.gather(*calls) == expected, round_
        await cluster.assert_all_free()
        # Every KV head came over the wire once: no rank computed its own.
        assert await cluster.metric("decode-0", "tandem_worker_kv_bytes_total") > 0


@pytest.mark.parametrize(
    ("architecture", "prefill", "decode"),
    [("mistral-window", 2, 1), ("qwen2-tied", 1, 2), ("qwen3", 2, 4), ("llama-mha", 4, 2)],
)
async def test_every_family_and_shared_kv_heads(
    architecture: str,
    prefill: int,
    decode: int,
    tmp_path: Path,
    make_config: MakeConfig,
    connect: Connect,
) -> None:
    model_dir = make_tiny_model(architecture, tmp_path / architecture)
    prompts = random_prompts(2, [9, 40, 70])
    expected = reference_tokens(model_dir, prompts, 10)
    config = make_config(model_dir, **degrees(prefill, decode))
    async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
        calls = [
            generate(dispatcher, f"r{i}", prompt, max_tokens=10, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ]
        assert await asyncio.gather(*calls) == expected
        await cluster.assert_all_free()


async def test_iterations_launched_ahead_change_nothing(
    tiny_llama: Path, make_config: MakeConfig, connect: Connect
) -> None:
    prompts = random_prompts(4, [3, 17, 70])
    expected = reference_tokens(tiny_llama, prompts, 12)
    config = make_config(scheduler={"overlap": "on"}, **degrees(2, 2))
    async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
        calls = [
            generate(dispatcher, f"r{i}", prompt, max_tokens=12, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ]
        assert await asyncio.gather(*calls) == expected
        await cluster.assert_all_free()


async def test_the_same_degrees_give_the_same_draws_however_a_request_is_served(
    make_config: MakeConfig, connect: Connect
) -> None:
    """Alone, in a crowd, and refilled after a preemption, which fetches KV from decode workers."""
    prompts = random_prompts(3, [3, 20, 41, 90, 90, 12, 55, 70])
    sampling = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 60, "ignore_eos": True}
    outputs = []
    for num_blocks in (2048, 64):
        config = make_config(cache={"num_blocks": num_blocks}, **degrees(2, 2))
        async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
            calls = [
                generate(dispatcher, f"r{i}", prompt, seed=1000 + i, **sampling)
                for i, prompt in enumerate(prompts)
            ]
            outputs.append(await asyncio.gather(*calls))
            outputs.append(
                [
                    await generate(dispatcher, f"alone-{i}", prompt, seed=1000 + i, **sampling)
                    for i, prompt in enumerate(prompts)
                ]
            )
            preemptions = await cluster.metric("decode-0", "tandem_worker_preemptions_total")
            assert (preemptions > 0) == (num_blocks == 64)
            await cluster.assert_all_free()
    assert all(output == outputs[0] for output in outputs)


async def test_a_prefill_worker_fetches_over_unequal_degrees_what_a_dead_one_delivered(
    make_config: MakeConfig, connect: Connect
) -> None:
    (prompt,) = random_prompts(12, [900])
    config = make_config(
        scheduler={"chunk_size": 4},
        lending={"mode": "threshold"},  # the decode worker must not compute the prompt itself
        **NO_PREFIXES,
        **degrees(1, 2),
    )
    async with (
        local_cluster(config, prefill=2, decode=1) as cluster,
        connect(cluster) as dispatcher,
    ):
        expected = await generate(dispatcher, "undisturbed", prompt)
        delivered = await cluster.metric("decode-0", "tandem_worker_kv_bytes_total")
        enough = delivered * 1.2
        before = await cluster.metric("prefill-0", "tandem_worker_tokens_total")
        running = asyncio.create_task(generate(dispatcher, "killed", prompt))
        async with asyncio.timeout(30):
            while await cluster.metric("decode-0", "tandem_worker_kv_bytes_total") < enough:
                pass
        moved = await cluster.metric("prefill-0", "tandem_worker_tokens_total") != before
        victim, heir = ("prefill-0", "prefill-1") if moved else ("prefill-1", "prefill-0")
        cluster.workers[victim].kill()
        assert await asyncio.wait_for(running, 60) == expected
        assert await cluster.metric("decode-0", "tandem_worker_kept_tokens_total") > 0
        await cluster.assert_all_free(["decode-0", heir])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_lost_rank_is_a_lost_worker_and_changes_no_output(
    victim: str, number: signal.Signals, make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(7)
    config = make_config(**NO_PREFIXES, **degrees(2, 2))
    async with (
        local_cluster(config, prefill=2, decode=2) as cluster,
        connect(cluster) as dispatcher,
    ):
        expected, seconds = await timed(run_all(dispatcher, "undisturbed", prompts))
        for moment in (0.1, 0.5):
            running = asyncio.create_task(run_all(dispatcher, f"at {moment}", prompts))
            await asyncio.sleep(moment * seconds)
            worker = cluster.workers[victim]
            worker.signal(number, rank=1)
            assert await asyncio.wait_for(running, 90) == expected, moment
            await asyncio.to_thread(worker.process.join, 20)
            assert worker.process.exitcode == 1  # it ended itself
            await cluster.assert_all_free(set(cluster.workers) - {victim})
            worker.kill()
            await cluster.add((worker.role, victim))
            await cluster.publish()
            await until_ready(dispatcher)
        assert await run_all(dispatcher, "after", prompts) == expected


async def test_a_short_freeze_of_rank_0_is_survived_by_its_other_ranks(
    make_config: MakeConfig, connect: Connect
) -> None:
    prompts = make_prompts(10)
    async with (
        local_cluster(make_config(**degrees(2, 2)), prefill=2, decode=2) as cluster,
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_no_rank_outlives_rank_0(
    number: signal.Signals, make_config: MakeConfig, connect: Connect
) -> None:
    async with local_cluster(make_config(**degrees(2, 2))) as cluster:
        worker = cluster.workers["decode-0"]
        worker.signal(number)
        worker.process.kill()
        await asyncio.to_thread(worker.followers[0].join, 20)
        assert worker.followers[0].exitcode == 1
