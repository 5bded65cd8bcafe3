"""How much of a transfer a request waits for: an 8B prefill of 4k tokens, with and without sending.

Layer groups are sent while the next ones are computed, as a prefill worker does. Exposed is the
time until the last piece is acknowledged, less the time of the same prefill with nothing sent. The
other process shares the device here, so what it costs is an upper bound.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.harness import Machine, Result, SkippedError, percent
from benchmarks.gpu.peer import Receiver, check_nccl
from tandem.core.sequence import IterationPlan, Sequence
from tandem.engine import Engine, LayerGroup
from tandem.transfer import Piece
from tandem_kernels.implementation import ENVIRONMENT_VARIABLE

_CHUNK = 2048


def run(machine: Machine, result: Result) -> None:
    if not machine.cuda:  # two threads compute here, which the interpreter cannot
        os.environ[ENVIRONMENT_VARIABLE] = "reference"
    shape = models.TINY if machine.small else models.LLAMA_8B
    tokens = 24 if machine.small else 4096
    with tempfile.TemporaryDirectory() as folder:
        blocks = tokens // 16 + 40
        engine = models.random_engine(Path(folder), shape, machine.device, blocks)
        seq = models.sequence(engine, "prompt", tokens, 0)
        plans = models.prefill_plans(seq, min(_CHUNK, tokens // 2))
        alone = statistics.median(_alone(machine, engine, plans) for _ in range(5))
        for backend in ("nccl", "gloo") if machine.cuda else ("gloo",):
            if backend == "nccl":
                try:
                    check_nccl()
                except SkippedError as reason:
                    result.notes.append(str(reason))
                    continue
            with result.guard(backend):
                _measure(machine, result, engine, seq, plans, backend, alone)


def _alone(machine: Machine, engine: Engine, plans: list[IterationPlan]) -> float:
    machine.synchronize()
    started = time.perf_counter()
    for plan in plans:
        engine.run(plan)
    machine.synchronize()
    return time.perf_counter() - started


def _measure(
    machine: Machine,
    result: Result,
    engine: Engine,
    seq: Sequence,
    plans: list[IterationPlan],
    backend: str,
    alone: float,
) -> None:
    with Receiver(machine, engine.storage, backend) as receiver:
        times = [_sending(machine, engine, seq, plans, receiver, leg_id) for leg_id in range(1, 6)]
    computed, arrived = (statistics.median(column) for column in zip(*times[1:], strict=True))
    result.values[backend] = {"alone": alone, "computed": computed, "arrived": arrived}
    result.rows.append(
        {
            "backend": backend,
            "tokens": seq.num_tokens,
            "prefill alone, ms": 1e3 * alone,
            "prefill while sending, ms": 1e3 * computed,
            "last piece acknowledged, ms": 1e3 * arrived,
            "exposed, ms": 1e3 * (arrived - alone),
            "exposed, of the prefill": percent(arrived - alone, alone),
        }
    )


def _sending(
    machine: Machine,
    engine: Engine,
    seq: Sequence,
    plans: list[IterationPlan],
    receiver: Receiver,
    leg_id: int,
) -> tuple[float, float]:
    """Return seconds until the prefill is computed and until everything has arrived."""
    slots = engine.storage.slots(seq.block_table, 0, seq.num_tokens)
    receiver.expect(leg_id, 0, slots)
    machine.synchronize()
    started = time.perf_counter()
    receiver.transfer.open_sends(leg_id)
    for number, plan in enumerate(plans):
        (chunk,) = plan.chunks
        part = slots[chunk.start : chunk.end]

        def send(
            group: LayerGroup, number: int = number, chunk: Any = chunk, part: Any = part
        ) -> None:
            receiver.transfer.send(
                Piece(
                    leg_id,
                    number,
                    group.first_layer,
                    group.num_layers,
                    chunk.start,
                    part,
                    group.ready,
                )
            )

        engine.run(plan, send)
    receiver.transfer.finish_sends(leg_id)
    if machine.cuda:
        torch.cuda.current_stream().synchronize()
    computed = time.perf_counter() - started
    receiver.events.wait_sent(leg_id)
    return computed, time.perf_counter() - started
