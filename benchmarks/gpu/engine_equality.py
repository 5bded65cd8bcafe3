"""Tiny models of several architectures: tokens on this device equal those of the CPU's reference.

Prompts in chunks, sequences that join late, greedy and sampled; in float32, where the arg-max is
the same on both but for ties. On CUDA with and without graphs; elsewhere on the interpreter.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.harness import Machine, Result
from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine import Engine
from tandem_kernels.implementation import ENVIRONMENT_VARIABLE, implementation, operations
from tiny_models import make_tiny_model

_PROMPTS = (1, 7, 33, 150, 290)
_ARCHITECTURES = ("llama3-rope", "mistral-window", "qwen2-tied", "qwen3-biases")
_BLOCK_SIZE = 4


def run(machine: Machine, result: Result) -> None:
    prompts = _PROMPTS[:3] if machine.small else _PROMPTS
    new_tokens = 3 if machine.small else 24
    torch.backends.cuda.matmul.allow_tf32 = False
    for architecture in _ARCHITECTURES[: 2 if machine.small else None]:
        with result.guard(architecture), tempfile.TemporaryDirectory() as folder:
            directory = make_tiny_model(architecture, Path(folder))
            _use("reference")
            expected = _generate(_engine(directory, "cpu"), prompts, new_tokens)
            _use("triton")
            engine = _engine(directory, machine.device.type)
            name = implementation(machine.device)
            _compare(result, architecture, name, expected, _generate(engine, prompts, new_tokens))
            engine.capture_decode()
            name += ", decode graphs" if machine.cuda else ", decode batches as in graphs"
            _compare(result, architecture, name, expected, _generate(engine, prompts, new_tokens))


def _use(kernels: str) -> None:
    os.environ[ENVIRONMENT_VARIABLE] = kernels
    operations.cache_clear()


def _engine(directory: Path, device: str) -> Engine:
    model = ModelConfig(path=str(directory), dtype="float32")
    return Engine(directory, model, CacheConfig(block_size=_BLOCK_SIZE, num_blocks=600), device)


def _compare(
    result: Result, architecture: str, name: str, expected: list[Any], tokens: list[Any]
) -> None:
    wrong = sum(a != b for a, b in zip(expected, tokens, strict=True))
    result.check(not wrong, f"{architecture}, {name}: {wrong} of {len(expected)} requests differ")
    count = sum(map(len, expected))
    result.rows.append(
        {
            "model": architecture,
            "operations": name,
            "requests": len(expected),
            "tokens": count,
            "requests that differ": wrong,
        }
    )


def _generate(engine: Engine, prompts: tuple[int, ...], new_tokens: int) -> list[list[int]]:
    """Every prompt greedily and sampled; sequence i joins at iteration i."""
    sequences, first = [], 0
    for length in prompts:
        ids = tuple((31 * i * i + 7 * i + length) % 256 for i in range(length))
        for temperature in (0.0, 0.8):
            sampling = SamplingParams(
                max_tokens=new_tokens, temperature=temperature, top_p=0.95, seed=length,
                ignore_eos=True,
            )  # fmt: skip
            seq = Sequence(Request(f"{length}-{temperature}", ids, length, sampling), arrival=0)
            blocks = -(-(length + new_tokens) // _BLOCK_SIZE)
            seq.block_table = list(range(first, first + blocks))
            first += blocks
            sequences.append(seq)
    iteration = 0
    while any(seq.num_output_tokens < new_tokens for seq in sequences):
        iteration += 1
        running = [s for s in sequences[:iteration] if s.num_output_tokens < new_tokens]
        chunks = tuple(
            ScheduledChunk(seq, seq.num_computed, min(64, seq.num_uncomputed)) for seq in running
        )
        output = engine.run(IterationPlan(chunks))
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
        for seq, token in output.tokens.items():
            seq.token_ids.append(token.token_id)
    return [seq.token_ids for seq in sequences]
