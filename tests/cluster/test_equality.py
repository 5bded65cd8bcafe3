"""Promise 1 through the whole cluster: the tokens do not depend on how a request was served."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from local_cluster import Connect, MakeConfig, generate, local_cluster
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.gateway.dispatch import Dispatcher
from tandem.gateway.interfaces import OutputEvent
from tiny_models import ARCHITECTURES, make_tiny_model

pytestmark = pytest.mark.cluster


def reference_tokens(model_dir: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy float32 tokens of `transformers`."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=-1,
            )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def random_prompts(seed: int, lengths: list[int], vocab: int = 200) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


async def all_events(dispatcher: Dispatcher, request: Request) -> list[OutputEvent]:
    return [event async for event in dispatcher.generate(request)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_greedy_tokens_equal_transformers(
    architecture: str, tmp_path: Path, make_config: MakeConfig, connect: Connect
) -> None:
    model_dir = make_tiny_model(architecture, tmp_path / architecture)
    prompts = random_prompts(1, [1, 5, 16, 17, 33, 70])
    expected = reference_tokens(model_dir, prompts, 12)
    async with local_cluster(make_config(model_dir)) as cluster, connect(cluster) as dispatcher:
        for round_ in ("cold", "prefix hits"):
            calls = [
                generate(dispatcher, f"{round_}-{i}", prompt, max_tokens=12, ignore_eos=True)
                for i, prompt in enumerate(prompts)
            ]
            assert await asyncio.gather(*calls) == expected, round_
        await cluster.assert_all_free()


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("chunk_size", [1, 64])
async def test_chunks_and_blocks_change_nothing(
    block_size: int, chunk_size: int, tiny_llama: Path, make_config: MakeConfig, connect: Connect
) -> None:
    prompts = random_prompts(2, [1, 2, 63, 64, 65, 150])
    expected = reference_tokens(tiny_llama, prompts, 8)
    config = make_config(
        cache={"block_size": block_size},
        scheduler={"chunk_size": chunk_size, "max_batch_tokens": 80},
    )
    async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
        calls = [
            generate(dispatcher, f"r{i}", prompt, max_tokens=8, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ]
        assert await asyncio.gather(*calls) == expected
        await cluster.assert_all_free()


async def test_prompt_logprobs_are_those_of_the_model_however_the_prompt_is_computed(
    tiny_llama: Path, make_config: MakeConfig, connect: Connect
) -> None:
    """In chunks, elsewhere, and after the same prompt has been cached."""
    (prompt,) = random_prompts(4, [75])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [logprobs[i - 1, prompt[i]].item() for i in range(1, len(prompt))]
    params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=2, ignore_eos=True)
    async with local_cluster(make_config()) as cluster, connect(cluster) as dispatcher:
        await generate(dispatcher, "fills the caches", prompt)
        request = Request("r", tuple(prompt), len(prompt), params)
        events = await all_events(dispatcher, request)
        assert events[0].cached_tokens == 0
        given = events[0].prompt_logprobs
        assert given is not None
        assert given[0] is None
        chosen = [entry.chosen.logprob for entry in given[1:] if entry is not None]
        assert chosen == pytest.approx(expected, abs=1e-4)
        series = "tandem_worker_tokens_total"
        computed = [await cluster.metric(name, series) for name in ("prefill-0", "decode-0")]
        # Both prompts whole, wherever; of 16 and 3 tokens the first of each came out of its prompt.
        assert sum(computed) >= 2 * len(prompt) + 15 + 2
        await cluster.assert_all_free()


async def test_cached_tokens_count_what_nobody_computed(
    make_config: MakeConfig, connect: Connect
) -> None:
    (prompt,) = random_prompts(5, [62])
    async with local_cluster(make_config(), decode=2) as cluster, connect(cluster) as dispatcher:
        counts = []
        for index in range(6):
            params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
            request = Request(f"r{index}", tuple(prompt), len(prompt), params)
            counts.append((await all_events(dispatcher, request))[0].cached_tokens)
        salted = Request("salted", tuple(prompt), len(prompt), params, cache_salt="tenant")
        counts.append((await all_events(dispatcher, salted))[0].cached_tokens)
        computed = await cluster.metric("prefill-0", "tandem_worker_tokens_total")
    assert counts == [0, 60, 60, 60, 60, 60, 0]
    assert computed < 3 * len(prompt)


async def test_sampled_tokens_do_not_depend_on_how_they_were_served(
    make_config: MakeConfig, connect: Connect
) -> None:
    """Disaggregated, colocated, alone, in a crowd, and under preemption: the same draws."""
    prompts = random_prompts(3, [3, 20, 41, 90, 90, 12, 55, 70])
    sampling = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 80, "ignore_eos": True}
    runs = {
        "disaggregated": make_config(),
        "colocated": make_config(worker={"disaggregated": False}),
        "preempted": make_config(cache={"num_blocks": 64}),
    }
    outputs = {}
    for name, config in runs.items():
        async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
            calls = [
                generate(dispatcher, f"r{i}", prompt, seed=1000 + i, **sampling)
                for i, prompt in enumerate(prompts)
            ]
            outputs[name] = await asyncio.gather(*calls)
            await cluster.assert_all_free()
            preemptions = await cluster.metric("decode-0", "tandem_worker_preemptions_total")
            assert (preemptions > 0) == (name == "preempted")
            if name == "disaggregated":
                alone = [
                    await generate(dispatcher, f"a{i}", prompt, seed=1000 + i, **sampling)
                    for i, prompt in enumerate(prompts)
                ]
                assert alone == outputs[name]
    assert outputs["disaggregated"] == outputs["colocated"] == outputs["preempted"]
    assert len({tuple(tokens) for tokens in outputs["colocated"]}) == len(prompts)
