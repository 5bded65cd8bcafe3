"""A live trace: every event of a request's life, in order, and nothing while nobody asks."""

from __future__ import annotations

import time

import pytest

from local_cluster import (
    Connect,
    LocalCluster,
    MakeConfig,
    Recorder,
    generate,
    local_cluster,
    until_ready,
)
from tandem.gateway.dispatch import Dispatcher
from tandem.timeline.breakdown import HANDOVER_TOTAL, SUBMIT_TOTAL, breakdown
from tandem.timeline.events import Timeline
from tandem.tracing.buffer import TraceBuffer
from tandem.tracing.collect import Target, recording, trace
from tandem.tracing.merge import Recording, merge

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

PROMPT = list(range(3, 83))  # five chunks of 16
IN_ORDER = [
    "routed", "submitted", "arrived", "accepted", "granted", "asked", "leg_arrived", "queued",
    "started",
]  # fmt: skip


def targets(cluster: LocalCluster) -> list[Target]:
    return [Target(name, worker.endpoint.address) for name, worker in cluster.workers.items()]


def times(timeline: Timeline, request: str) -> dict[str, float]:
    return {stage.name: stage.at for stage in timeline.stages if stage.request == request}


async def test_the_life_of_a_request_is_complete_and_in_order(make_config: MakeConfig) -> None:
    config = make_config(cache={"prefix_cache": False})
    async with local_cluster(config) as cluster:
        buffer = TraceBuffer("gateway")
        dispatcher = Dispatcher(
            config.gateway, cluster.controller_address, Recorder(), seed=0, trace=buffer
        )
        await dispatcher.start()
        try:
            await until_ready(dispatcher)
            await generate(dispatcher, "before", PROMPT)
            began = time.monotonic()
            async with recording(targets(cluster), 60.0) as tracer:
                buffer.record(60.0)
                await generate(dispatcher, "traced", PROMPT, max_tokens=5, ignore_eos=True)
                await cluster.assert_all_free()
                recordings = await tracer.collect(began)
                mine = Recording("gateway", buffer.events(began), is_gateway=True)
                again = await trace(targets(cluster), 0.001)
            await generate(dispatcher, "after", PROMPT)
            known = [await _known(target, began) for target in targets(cluster)]
        finally:
            await dispatcher.close()
    timeline = merge([*recordings, mine])
    named = {stage.request for stage in timeline.stages}
    named |= {part.request for box in timeline.iterations for part in box.parts}
    assert named == {"traced"}, "nothing of before and after"
    assert known == [{"traced"}, {"traced"}], "recording stopped with the block"
    assert len(again) == 2
    _check_stages(timeline)
    _check_iterations(timeline)
    _check_transfers(timeline)
    found = {step.name for step in breakdown(timeline)}
    assert {SUBMIT_TOTAL, HANDOVER_TOTAL} <= found


async def _known(target: Target, since: float) -> set[str]:
    """Names of all requests that a worker still knows from its ring, though it was switched off."""
    async with recording([target], 0.0) as tracer:
        timeline = merge(await tracer.collect(since))
    return {stage.request for stage in timeline.stages}


def _check_stages(timeline: Timeline) -> None:
    at = times(timeline, "traced")
    assert [name for name in IN_ORDER if name in at] == IN_ORDER
    passed = [at[name] for name in IN_ORDER]
    assert passed == sorted(passed), at
    assert at["started"] <= at["first_token"] <= at["finished"]
    assert at["landed"] <= at["joined"] <= at["finished"]


def _check_iterations(timeline: Timeline) -> None:
    prefill = [box for box in timeline.iterations if box.worker == "prefill-0"]
    decode = [box for box in timeline.iterations if box.worker == "decode-0"]
    chunks = [(part.start, part.length, part.is_decode) for box in prefill for part in box.parts]
    assert chunks == [(start, 16, False) for start in range(0, 80, 16)]
    steps = [(part.start, part.length, part.is_decode) for box in decode for part in box.parts]
    assert steps == [(80 + step, 1, True) for step in range(4)], "the first token came with prefill"
    for boxes in (prefill, decode):
        edges = [edge for box in boxes for edge in (box.began, box.ended)]
        assert edges == sorted(edges), "iterations of one worker follow each other"


def _check_transfers(timeline: Timeline) -> None:
    layers = {(kv.first_layer, kv.num_layers) for kv in timeline.transfers}
    for first, number in layers:
        covered = [
            (kv.start, kv.length)
            for kv in timeline.transfers
            if (kv.first_layer, kv.num_layers) == (first, number)
        ]
        assert covered == [(start, 16) for start in range(0, 80, 16)]
    for kv in timeline.transfers:
        assert (kv.sender, kv.receiver, kv.request) == ("prefill-0", "decode-0", "traced")
        assert kv.packed is not None
        assert kv.announced is not None
        assert kv.began <= kv.packed <= kv.announced <= kv.ended
    joined = times(timeline, "traced")["joined"]
    assert max(kv.ended for kv in timeline.transfers) <= joined


async def test_a_worker_that_always_records_is_asked_for_what_was(
    make_config: MakeConfig, connect: Connect
) -> None:
    config = make_config(tracing={"always": True})
    async with local_cluster(config) as cluster, connect(cluster) as dispatcher:
        await generate(dispatcher, "r", PROMPT, max_tokens=3, ignore_eos=True)
        await cluster.assert_all_free()
        timeline = merge(await trace(targets(cluster), 0.0))
        assert timeline.stages == []
        async with recording(targets(cluster), 0.0) as tracer:
            timeline = merge(await tracer.collect(0.0))
        assert "finished" in times(timeline, "r")
        async with recording(targets(cluster), 0.0) as tracer:
            assert merge(await tracer.collect(0.0)).stages == timeline.stages, "it goes on"
