"""An 8B Llama with random weights: prefill against the matmul rate, decode against the bandwidth.

Prefill MFU: floating-point operations of the prompt over time, against the measured bf16 matmul
rate. Decode MBU: weights read once and KV read once, over time, against the measured copy rate. An
iteration is a whole `Engine.run`, from plan to tokens on the host.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.harness import Machine, Result, percent, seconds, wall_seconds
from tandem.engine import Engine


def run(machine: Machine, result: Result) -> None:
    shape = models.TINY if machine.small else models.LLAMA_8B
    prompts = (16,) if machine.small else (1024, 4096)
    batches = ((2, 20),) if machine.small else ((1, 1024), (8, 1024), (32, 1024), (32, 4096))
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        engine = models.random_engine(Path(folder), shape, machine.device, _blocks(batches))
        machine.synchronize()
        result.notes.append(f"weights made on the device in {time.monotonic() - started:.1f} s")
        for tokens in prompts:
            with result.guard(f"prefill of {tokens}"):
                _prefill(machine, result, engine, shape, tokens)
        for rows, context in batches:
            with result.guard(f"decode of {rows} x {context}, launched"):
                _decode(machine, result, engine, shape, rows, context, "launched")
        started = time.monotonic()
        if machine.cuda:
            engine.capture_decode(sizes=sorted({rows for rows, _ in batches}))
            result.check(engine.replays_decode, "decode graphs could not be captured")
        result.notes.append(f"decode graphs captured in {time.monotonic() - started:.1f} s")
        for rows, context in batches if machine.cuda else ():
            with result.guard(f"decode of {rows} x {context}, graphs"):
                _decode(machine, result, engine, shape, rows, context, "graphs")


def _blocks(batches: tuple[tuple[int, int], ...]) -> int:
    return max(rows * -(-(context + 80) // 16) for rows, context in batches) + 300


def _prefill(
    machine: Machine, result: Result, engine: Engine, shape: dict[str, Any], tokens: int
) -> None:
    for chunk in sorted({tokens, min(tokens, 2048)}):
        seq = models.sequence(engine, "prefill", tokens, 0)
        plans = models.prefill_plans(seq, chunk)

        def prefill(plans: list[Any] = plans) -> None:
            for plan in plans:
                engine.run(plan)

        prefill()
        taken = wall_seconds(machine, prefill, 1 if machine.small else 5)
        rate = models.prefill_flops(shape, tokens) / taken
        result.values[f"prefill_{tokens}_chunk_{chunk}_mfu"] = rate / machine.matmul_rate
        result.rows.append(
            {
                "what": f"prefill of {tokens} tokens, chunks of {chunk}",
                "milliseconds": 1e3 * taken,
                "tokens/s": tokens / taken,
                "achieved": f"{rate / 1e12:.3g} TFLOP/s",
                "of the ceiling": percent(rate, machine.matmul_rate),
            }
        )


def _decode(
    machine: Machine,
    result: Result,
    engine: Engine,
    shape: dict[str, Any],
    rows: int,
    context: int,
    how: str,
) -> None:
    each = models.blocks_of(engine, context)
    sequences = [models.sequence(engine, str(i), context, i * each) for i in range(rows)]
    plan = models.decode_plan(sequences)
    times = []
    for _ in range(2 if machine.small else 30):
        machine.synchronize()
        started = time.perf_counter()
        engine.run(plan)
        times.append(time.perf_counter() - started)
    taken = statistics.median(times[len(times) // 3 :])
    weights = (models.layer_parameters(shape) + models.head_parameters(shape)) * 2
    moved = weights + rows * context * engine.storage.bytes_per_token
    result.values[f"decode_{rows}x{context}_{how}_mbu"] = moved / taken / machine.copy_rate
    result.rows.append(
        {
            "what": f"decode of {rows} x {context} tokens, {how}",
            "milliseconds": 1e3 * taken,
            "tokens/s": rows / taken,
            "achieved": f"{moved / taken / 1e12:.3g} TB/s",
            "of the ceiling": percent(moved / taken, machine.copy_rate),
        }
    )
    if how == "graphs":
        _replay_only(machine, result, engine, plan, moved, rows, context)


def _replay_only(
    machine: Machine,
    result: Result,
    engine: Engine,
    plan: Any,
    moved: int,
    rows: int,
    context: int,
) -> None:
    """The graph alone, back to back: what is left is host work, sampling and reading tokens."""
    replay = engine.decode_replay(plan.chunks)
    with torch.inference_mode():
        taken = seconds(machine, replay, 200)
    result.values[f"decode_{rows}x{context}_replay_mbu"] = moved / taken / machine.copy_rate
    result.rows.append(
        {
            "what": f"decode of {rows} x {context} tokens, the graph alone",
            "milliseconds": 1e3 * taken,
            "tokens/s": rows / taken,
            "achieved": f"{moved / taken / 1e12:.3g} TB/s",
            "of the ceiling": percent(moved / taken, machine.copy_rate),
        }
    )
