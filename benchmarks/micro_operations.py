"""Each CPU kernel against what the machine allows: bytes over memory speed, FLOPs over GEMM rate.

Measures in this process, on the threads that torch was given. Weights and KV are walked through
in copies larger than any cache, so that what should come from memory does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from tandem_kernels import RaggedBatch, cpu
from tandem_kernels.cpu import operations as ops
from tandem_kernels.paged_attention import paged_attention
from tandem_kernels.silu_mul import silu_mul

COLD_BYTES = 256 * 2**20
"""Copies of an operand together are at least this large."""
BUDGET = 1.0
"""Seconds after which a measurement that has been repeated once is not repeated again."""


@dataclass(frozen=True)
class Shape:
    """The sizes that decide how long an operation takes."""

    hidden: int = 896
    inner: int = 4864
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 151936
    prompt: int = 1024


@dataclass(frozen=True)
class Bounds:
    """What the machine reaches on the same threads."""

    read_bytes: float
    """Bytes per second, the best of reading and of copying (which moves each byte twice)."""
    gemm_flops: float
    """Floating-point operations per second of torch's bfloat16 matrix product."""


@dataclass(frozen=True)
class Measured:
    """One operation: seconds of ours and of the torch reference, and the least it could take."""

    name: str
    seconds: float
    reference_seconds: float | None
    bound_seconds: float


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call after one that warms up; fewer calls where they are slow."""
    call()
    times: list[float] = []
    while len(times) < 2 or (len(times) < repeats and sum(times) < BUDGET):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def measure_bounds(repeats: int, size: int = COLD_BYTES) -> Bounds:
    """Measure memory and matrix product."""
    memory = torch.ones(size // 4)
    target = torch.empty_like(memory)
    reading = size / seconds_of(lambda: memory.sum(), repeats)
    copying = 2 * size / seconds_of(lambda: target.copy_(memory), repeats)
    left = torch.randn(1024, 1024).bfloat16()
    right = torch.randn(1024, 4096).bfloat16()
    flops = 2 * 1024 * 1024 * 4096 / seconds_of(lambda: left @ right, repeats)
    return Bounds(max(reading, copying), flops)


def measure_operations(shape: Shape, bounds: Bounds, repeats: int) -> Iterator[Measured]:
    """Measure everything that an iteration is made of, in bfloat16, one operation at a time."""
    context = cpu.Context(torch.get_num_threads())
    for count in (1, 4, 8, 16, 32, shape.prompt):
        yield _gated(context, shape, bounds, count, repeats)
    yield _head(context, shape, bounds, 8, repeats)
    yield _attention(context, shape, bounds, [(shape.prompt, 1)] * 8, repeats)
    yield _attention(context, shape, bounds, [(0, shape.prompt)], repeats)
    yield _norm(context, shape, bounds, repeats)
    yield _choice(context, shape, bounds, 8, repeats)


def _copies(size: int) -> int:
    return max(1, -(-COLD_BYTES // size))


def _gated(
    context: cpu.Context, shape: Shape, bounds: Bounds, count: int, repeats: int
) -> Measured:
    outputs, inputs = 2 * shape.inner, shape.hidden
    size = outputs * inputs * 2
    weights, packed = _gated_weights(context, outputs, inputs)
    x = torch.randn(count, inputs).bfloat16()
    ours, theirs = cycle(packed), cycle(weights)
    return Measured(
        name=f"gate, up and SiLU {outputs} x {inputs}, {count} rows",
        seconds=seconds_of(lambda: ops.silu_linear(context, next(ours), x), repeats),
        reference_seconds=seconds_of(lambda: silu_mul(functional.linear(x, next(theirs))), repeats),
        bound_seconds=max(
            size / bounds.read_bytes, 2 * outputs * inputs * count / bounds.gemm_flops
        ),
    )


@lru_cache(maxsize=1)
def _gated_weights(
    context: cpu.Context, outputs: int, inputs: int
) -> tuple[list[Tensor], list[cpu.PackedLinear]]:
    """Return copies of a weight as torch reads it and as we do, made once for all row counts."""
    weight = torch.randn(outputs, inputs).bfloat16()
    weights = [weight.clone() for _ in range(_copies(outputs * inputs * 2))]
    return weights, [cpu.pack_gate_up(context, weight, None) for weight in weights]


def _head(context: cpu.Context, shape: Shape, bounds: Bounds, count: int, repeats: int) -> Measured:
    weight = torch.randn(shape.vocab, shape.hidden).bfloat16()
    packed = cpu.pack_linear(context, weight, None)
    x = torch.randn(count, shape.hidden).bfloat16()
    out = torch.empty(count, shape.vocab)
    return Measured(
        name=f"output projection, {count} rows",
        seconds=seconds_of(lambda: ops.linear(context, packed, x, out), repeats),
        reference_seconds=seconds_of(lambda: functional.linear(x, weight).float(), repeats),
        bound_seconds=weight.numel() * 2 / bounds.read_bytes,
    )


def _attention(
    context: cpu.Context,
    shape: Shape,
    bounds: Bounds,
    spans: list[tuple[int, int]],
    repeats: int,
) -> Measured:
    block_size = 16
    blocks = [-(-(start + length) // block_size) for start, length in spans]
    firsts = [sum(blocks[:index]) for index in range(len(blocks))]
    tables = [list(range(first, first + n)) for first, n in zip(firsts, blocks, strict=True)]
    starts, lengths = [span[0] for span in spans], [span[1] for span in spans]
    batch = RaggedBatch.build(tables, starts, lengths, block_size)
    per_copy = 2 * sum(blocks) * block_size * shape.kv_heads * shape.head_dim * 2
    copies = _copies(per_copy) if max(lengths) == 1 else 1
    cache = torch.randn(
        copies, 2, sum(blocks), block_size, shape.kv_heads, shape.head_dim
    ).bfloat16()
    query = torch.randn(batch.num_tokens, shape.heads, shape.head_dim).bfloat16()
    scale = shape.head_dim**-0.5
    ours, theirs = cycle(cache), cycle(cache)

    def run(attend: Callable[..., Tensor], kv: Tensor) -> Tensor:
        return attend(query, kv[0], kv[1], batch, scale)

    def compiled(*arguments: object) -> Tensor:
        return ops.paged_attention(context, *arguments)  # type: ignore[arg-type]

    pairs = sum(length * start + length * (length + 1) // 2 for start, length in spans)
    flops = 4 * pairs * shape.heads * shape.head_dim
    kind = f"{len(spans)} decode rows, context" if max(lengths) == 1 else "a prompt chunk of"
    return Measured(
        name=f"paged attention, {kind} {shape.prompt}",
        seconds=seconds_of(lambda: run(compiled, next(ours)), repeats),
        reference_seconds=seconds_of(lambda: run(paged_attention, next(theirs)), repeats),
        bound_seconds=max(per_copy / bounds.read_bytes, flops / bounds.gemm_flops),
    )


def _norm(context: cpu.Context, shape: Shape, bounds: Bounds, repeats: int) -> Measured:
    x = torch.randn(shape.prompt, shape.hidden)
    weight = torch.ones(shape.hidden).bfloat16()
    half = x.bfloat16()

    def reference() -> Tensor:
        wide = half.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return normed.bfloat16() * weight

    return Measured(
        name=f"RMSNorm, {shape.prompt} rows",
        seconds=seconds_of(lambda: ops.rms_norm(context, x, weight, 1e-6), repeats),
        reference_seconds=seconds_of(reference, repeats),
        bound_seconds=x.numel() * 6 / bounds.read_bytes,
    )


def _choice(
    context: cpu.Context, shape: Shape, bounds: Bounds, count: int, repeats: int
) -> Measured:
    logits = torch.randn(count, shape.vocab)
    return Measured(
        name=f"greedy choice, {count} rows",
        seconds=seconds_of(lambda: ops.argmax(context, logits), repeats),
        reference_seconds=seconds_of(lambda: logits.argmax(1), repeats),
        bound_seconds=logits.numel() * 4 / bounds.read_bytes,
    )
