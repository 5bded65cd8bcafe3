"""One engine in a process of its own: tokens per second of prefill and of decode.

A program: `python -m benchmarks.micro_engine MODEL THREADS DTYPE PROMPT CONTEXT STEPS BATCH...`
prints one JSON object. Which kernels run is decided by TANDEM_KERNELS, as in a worker.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from tandem.controller.logs import configure_logging
from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine import Engine

BLOCK_SIZE = 16
PREFILLS = 3
WARM_UP = 3
TOGETHER = 8
"""Prompts that are prefilled in one iteration."""


def measure(
    model: Path, threads: int, dtype: str, prompt: int, context: int, steps: int, batches: list[int]
) -> dict[str, object]:
    """Return `kernels`, `prefill` and, by batch size, `decode`: tokens per second, medians."""
    torch.set_num_threads(threads)
    per_sequence = -(-(context + WARM_UP + steps + 1) // BLOCK_SIZE)
    num_blocks = max(per_sequence * max(batches), prompt // BLOCK_SIZE + 2)
    engine = Engine(
        model,
        ModelConfig(path=str(model), dtype=dtype),  # type: ignore[arg-type]
        CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks),
        "cpu",
    )
    prefills = []
    for _ in range(PREFILLS):
        start = time.perf_counter()
        _prefill(engine, _sequences(1, prompt, prompt // BLOCK_SIZE + 2))
        prefills.append(prompt / (time.perf_counter() - start))
    decode = {}
    for count in batches:
        sequences = _sequences(count, context, per_sequence)
        for start in range(0, count, TOGETHER):
            _prefill(engine, sequences[start : start + TOGETHER])
        times = [_step(engine, sequences) for _ in range(WARM_UP + steps)]
        decode[str(count)] = count / median(times[WARM_UP:])
    return {"kernels": engine.kernels, "prefill": median(prefills), "decode": decode}


def _sequences(count: int, length: int, blocks: int) -> list[Sequence]:
    sampling = SamplingParams(max_tokens=10**6, temperature=0.0, ignore_eos=True)
    sequences = []
    for index in range(count):
        tokens = tuple((31 * i + 7 * index) % 200 + 3 for i in range(length))
        sequence = Sequence(Request(str(index), tokens, length, sampling), arrival=index)
        sequence.block_table = list(range(index * blocks, (index + 1) * blocks))
        sequences.append(sequence)
    return sequences


def _prefill(engine: Engine, sequences: list[Sequence]) -> None:
    _run(engine, [ScheduledChunk(seq, 0, seq.num_tokens) for seq in sequences])


def _step(engine: Engine, sequences: list[Sequence]) -> float:
    start = time.perf_counter()
    _run(engine, [ScheduledChunk(seq, seq.num_tokens - 1, 1) for seq in sequences])
    return time.perf_counter() - start


def _run(engine: Engine, chunks: list[ScheduledChunk]) -> None:
    output = engine.run(IterationPlan(tuple(chunks)))
    for sequence, token in output.tokens.items():
        sequence.token_ids.append(token.token_id)


def main(model: str, threads: str, dtype: str, *sizes: str) -> None:
    configure_logging("error")  # KV is meant to hold no more than what is measured
    prompt, context, steps, *batches = map(int, sizes)
    print(json.dumps(measure(Path(model), int(threads), dtype, prompt, context, steps, batches)))


if __name__ == "__main__":
    main(*sys.argv[1:])
