"""A whole disaggregated cluster without Ray on one device: one prefill and one decode worker.

Requests go through the dispatcher as the gateway sends them; their tokens must be those of an
engine on the CPU's reference. KV crosses between the two processes: over NCCL where two ranks may
share the device, else over gloo.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.gpu.harness import Machine, Result, SkippedError
from benchmarks.gpu.peer import check_nccl
from local_cluster import LocalCluster, Recorder, local_cluster, until_ready
from tandem.core.config import CacheConfig, ModelConfig, TandemConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine import Engine
from tandem.gateway.dispatch import Dispatcher
from tandem_kernels.implementation import ENVIRONMENT_VARIABLE
from tiny_models import make_tiny_model

_NEW_TOKENS = 24


def run(machine: Machine, result: Result) -> None:
    os.environ.pop(ENVIRONMENT_VARIABLE, None)  # an interpreted cluster would only time out
    backend = "gloo"
    if machine.cuda:
        try:
            check_nccl()
            backend = "nccl"
        except SkippedError as reason:
            result.notes.append(f"{reason}; KV goes over gloo")
    lengths = (5, 60, 200) if machine.small else (5, 60, 200, 400, 700, 900)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model("llama", Path(folder))
        expected = _expected(model, lengths)
        asyncio.run(_serve(machine, result, model, lengths, expected, backend))


def _prompt(length: int) -> tuple[int, ...]:
    return tuple((31 * i * i + 7 * i + length) % 256 for i in range(length))


def _request(length: int) -> Request:
    sampling = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    return Request(f"r{length}", _prompt(length), length, sampling)


def _expected(model: Path, lengths: tuple[int, ...]) -> list[list[int]]:
    """Greedy tokens of an engine on the CPU."""
    config = ModelConfig(path=str(model), dtype="float32")
    engine = Engine(model, config, CacheConfig(block_size=16, num_blocks=64), "cpu")
    outputs = []
    for length in lengths:
        seq = Sequence(_request(length), arrival=0)
        seq.block_table = list(range(-(-(length + _NEW_TOKENS) // 16)))
        start = 0
        while seq.num_output_tokens < _NEW_TOKENS:
            chunk = ScheduledChunk(seq, start, seq.num_tokens - start)
            start = seq.num_tokens
            output = engine.run(IterationPlan((chunk,)))
            seq.token_ids.append(output.tokens[seq].token_id)
        outputs.append(seq.token_ids[length:])
    return outputs


async def _serve(
    machine: Machine,
    result: Result,
    model: Path,
    lengths: tuple[int, ...],
    expected: list[list[int]],
    backend: str,
) -> None:
    config = TandemConfig.model_validate(
        {
            "model": {"path": str(model), "served_name": "tiny", "dtype": "float32"},
            "cache": {"block_size": 16, "num_blocks": 1024},
            "scheduler": {"chunk_size": 256},
            "worker": {"threads": 1, "local_prefill_max_tokens": 4, "peer_timeout": 20},
            "transfer": {"backend": backend},
            "gateway": {"worker_timeout": 20},
        }
    )
    started = time.monotonic()
    async with local_cluster(config, device=machine.device.type) as cluster:
        result.notes.append(f"cluster ready after {time.monotonic() - started:.1f} s")
        dispatcher = Dispatcher(config.gateway, cluster.controller_address, Recorder(), seed=0)
        await dispatcher.start()
        try:
            await until_ready(dispatcher)
            for attempt in ("first", "second"):
                await _all(result, dispatcher, lengths, expected, attempt)
            await _sent(result, cluster)
        finally:
            await dispatcher.close()


async def _all(
    result: Result,
    dispatcher: Dispatcher,
    lengths: tuple[int, ...],
    expected: list[list[int]],
    attempt: str,
) -> None:
    """All requests at once; the second time their prompts are cached."""
    outcomes = await asyncio.gather(*(_one(dispatcher, length, attempt) for length in lengths))
    wrong = sum(tokens != want for (tokens, _, _), want in zip(outcomes, expected, strict=True))
    result.check(not wrong, f"{attempt} time: {wrong} of {len(lengths)} requests differ")
    result.rows.append(
        {
            "requests": f"{len(lengths)} at once, {attempt} time",
            "that differ from the CPU": wrong,
            "median TTFT, ms": 1e3 * statistics.median(ttft for _, ttft, _ in outcomes),
            "median ITL, ms": 1e3 * statistics.median(itl for _, _, itl in outcomes),
        }
    )


async def _one(dispatcher: Dispatcher, length: int, attempt: str) -> tuple[list[int], float, float]:
    request = _request(length)
    request = Request(
        f"{request.request_id}-{attempt}", request.token_ids, length, request.sampling
    )
    tokens: list[int] = []
    started, times = time.perf_counter(), []
    async for event in dispatcher.generate(request):
        if event.token_ids:
            times.append(time.perf_counter())
            tokens.extend(event.token_ids)
    gaps = [b - a for a, b in pairwise(times)]
    return tokens, times[0] - started, statistics.median(gaps) if gaps else 0.0


async def _sent(result: Result, cluster: LocalCluster) -> None:
    violations = [await cluster.violations(name) for name in cluster.workers]
    result.check(not any(violations), f"block pools are not whole: {violations}")
    if torch.cuda.is_available():
        result.values["allocated"] = torch.cuda.memory_allocated()
