"""Which policy schedules is invisible in the tokens, on separate pools and colocated."""

from __future__ import annotations

import asyncio
import random

import pytest

from local_cluster import Connect, MakeConfig, generate, local_cluster

pytestmark = pytest.mark.cluster

RUNS: dict[str, tuple[dict[str, object], bool]] = {
    "default": ({}, True),
    "static, concatenated": (
        {"decode_policy": "static_batching", "prefill_policy": "concatenation", "batch_size": 3},
        True,
    ),
    "fair share, shortest": (
        {"decode_policy": "fair_share", "prefill_policy": "shortest_prompt"},
        True,
    ),
    "prefill first": ({"policy": "prefill_first"}, False),
    "deadline": ({"policy": "deadline"}, False),
    "auto chunk, out of blocks": ({"policy": "auto_chunk"}, False),
}
"""Scheduler settings, and whether prompts are prefilled on workers of their own."""


async def test_tokens_do_not_depend_on_the_policy(
    make_config: MakeConfig, connect: Connect
) -> None:
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 200) for _ in range(length)] for length in (3, 40, 12, 90, 70, 25)]
    sampling = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    outputs = {}
    for name, (settings, disaggregated) in RUNS.items():
        config = make_config(
            scheduler=settings,
            worker={"disaggregated": disaggregated},
            cache={"num_blocks": 48 if "blocks" in name else 2048},
        )
        async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
            calls = [
                generate(dispatcher, f"r{i}", prompt, seed=i, **sampling)
                for i, prompt in enumerate(prompts)
            ]
            async with asyncio.timeout(30):
                outputs[name] = await asyncio.gather(*calls)
            await cluster.assert_all_free()
            status = await cluster.status("decode-0")
            assert status.policy == settings.get(
                "decode_policy", settings.get("policy", "chunked_prefill")
            )
    assert all(output == outputs["default"] for output in outputs.values())
