"""Scheduling ahead is invisible: the same tokens, in whatever way sequences end or give way."""

from __future__ import annotations

import asyncio
import random

import pytest

from local_cluster import Connect, LocalCluster, MakeConfig, generate, local_cluster
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.gateway.dispatch import Dispatcher

pytestmark = pytest.mark.cluster

Outcome = list[tuple[int, float | None, str | None]]
PROMPT_LENGTHS = (3, 40, 12, 90, 70, 25, 1, 55)


def requests(stop_token_ids: tuple[int, ...]) -> list[Request]:
    """One of every kind: each brings something that decides between two iterations."""
    rng = random.Random(7)
    prompts = [[rng.randrange(3, 200) for _ in range(length)] for length in PROMPT_LENGTHS]
    kinds: list[dict[str, object]] = [
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.0, "stop_token_ids": stop_token_ids},
        {"temperature": 1.0, "stop_token_ids": stop_token_ids, "min_tokens": 9},
        {"temperature": 0.8, "logprobs": 3, "top_k": 30},
        {"temperature": 1.0, "prompt_logprobs": 1, "logprobs": 0},
        {"temperature": 0.0, "logit_bias": {7: 4.0, 9: -100.0}},
        {"temperature": 1.0, "min_p": 0.02},
        {"temperature": 1.0},
    ]
    return [
        Request(f"r{i}", tuple(prompt), len(prompt), SamplingParams(**params))  # type: ignore[arg-type]
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
        for params in [{"max_tokens": 24 + i, "ignore_eos": True, "seed": i, **kind}]
    ]


def penalised() -> list[Request]:
    sampling = SamplingParams(
        max_tokens=24, temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.4, seed=5
    )
    return [Request(f"p{i}", (5, 6, 7, 8 + i), 4, sampling) for i in range(2)]


async def outcome(dispatcher: Dispatcher, request: Request) -> Outcome:
    result: Outcome = []
    async for event in dispatcher.generate(request):
        for index, token_id in enumerate(event.token_ids):
            entry = event.logprobs[index] if event.logprobs else None
            ends = index == len(event.token_ids) - 1  # an event may bring several tokens
            reason = event.finish_reason if ends else None
            result.append((token_id, entry.chosen.logprob if entry else None, reason))
    return result


async def run(cluster: LocalCluster, dispatcher: Dispatcher, sent: list[Request]) -> list[Outcome]:
    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(*(outcome(dispatcher, request) for request in sent))
    await cluster.assert_all_free()
    return outcomes


@pytest.mark.parametrize("disaggregated", [True, False])
async def test_the_same_tokens_with_and_without(
    disaggregated: bool, make_config: MakeConfig, connect: Connect
) -> None:
    outcomes: dict[str, list[Outcome]] = {}
    stops: tuple[int, ...] = ()
    for overlap in ("off", "on"):
        config = make_config(
            scheduler={"overlap": overlap}, worker={"disaggregated": disaggregated}
        )
        async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
            if not stops:  # tokens that are drawn in the middle, so that sequences stop there
                free = await run(cluster, dispatcher, requests(()))
                stops = tuple(free[row][11][0] for row in (1, 2))
            sent = [*requests(stops), *penalised()]
            outcomes[overlap] = await run(cluster, dispatcher, sent)
            again = await run(cluster, dispatcher, sent)  # from what was published meanwhile
            assert [[token for token, *_ in one] for one in again] == [
                [token for token, *_ in one] for one in outcomes[overlap]
            ]
    assert outcomes["on"] == outcomes["off"]
    assert any(one[-1][2] == "stop" and len(one) < 24 for one in outcomes["on"])


async def test_the_same_tokens_when_sequences_are_preempted(
    make_config: MakeConfig, connect: Connect
) -> None:
    outcomes = {}
    for overlap in ("off", "on"):
        config = make_config(scheduler={"overlap": overlap}, cache={"num_blocks": 64})
        async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
            calls = [
                generate(
                    dispatcher, f"r{i}", range(10 + i, 80 + i), seed=i, temperature=1.0,
                    max_tokens=80, ignore_eos=True,
                )
                for i in range(6)
            ]  # fmt: skip
            async with asyncio.timeout(60):
                outcomes[overlap] = await asyncio.gather(*calls)
            assert await cluster.metric("decode-0", "tandem_worker_preemptions_total") > 0
            await cluster.assert_all_free()
    assert outcomes["on"] == outcomes["off"]


async def test_cancelled_at_any_moment_nothing_is_left(
    make_config: MakeConfig, connect: Connect
) -> None:
    """Some readers go away after a random number of tokens, others stay and notice nothing."""
    rng = random.Random(3)
    config = make_config(scheduler={"overlap": "on"}, cache={"num_blocks": 120})
    async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
        expected = await run(cluster, dispatcher, requests(()))

        async def go_away(request: Request, after: int) -> None:
            stream = dispatcher.generate(request)
            async for _ in stream:
                after -= 1
                if after <= 0:
                    break
            await stream.aclose()  # type: ignore[attr-defined]

        for round_ in range(4):
            leaving = [
                Request(f"c{round_}-{i}", tuple(range(5 + i, 40 + 3 * i)), 35 + 2 * i,
                        SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True))
                for i in range(6)
            ]  # fmt: skip
            staying, *_ = await asyncio.gather(
                run_without_check(dispatcher, requests(())),
                *(go_away(request, rng.randrange(1, 20)) for request in leaving),
            )
            assert [[t for t, *_ in one] for one in staying] == [
                [t for t, *_ in one] for one in expected
            ]
        await cluster.assert_all_free()


async def run_without_check(dispatcher: Dispatcher, sent: list[Request]) -> list[Outcome]:
    async with asyncio.timeout(60):
        return await asyncio.gather(*(outcome(dispatcher, request) for request in sent))
