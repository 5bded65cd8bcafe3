"""Each kernel's time at the shapes of an 8B Llama, against the least that it could take.

The bound is the larger of bytes over the copy rate and operations over the matmul rate, both as
measured on this device. Caches are cold. The torch reference stands beside it, and for prompts
torch's own attention over contiguous keys, which need not follow block tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.harness import Machine, Result, percent, seconds
from tandem_kernels import RaggedBatch
from tandem_kernels import triton as kernels
from tandem_kernels.implementation import REFERENCE


class Shape(NamedTuple):
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


LLAMA_8B = Shape(4096, 14_336, 32, 8, 128, 128_256)
TINY = Shape(64, 96, 4, 2, 16, 500)


class Timer:
    """Times a kernel and its reference and writes a row."""

    def __init__(self, machine: Machine, result: Result) -> None:
        self.machine, self.result = machine, result

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.machine.device, dtype=torch.bfloat16)

    def row(
        self,
        what: str,
        kernel: Callable[[], object],
        reference: Callable[[], object] | None,
        nbytes: float,
        flops: float = 0.0,
    ) -> None:
        machine = self.machine
        with self.result.guard(what):
            taken = seconds(machine, kernel)
            compared = seconds(machine, reference) if reference else None
            bound = max(nbytes / machine.copy_rate, flops / machine.matmul_rate)
            self.result.values[what] = {"seconds": taken, "bound": bound, "reference": compared}
            self.result.rows.append(
                {
                    "kernel": what,
                    "microseconds": 1e6 * taken,
                    "bound, us": 1e6 * bound,
                    "of the bound": percent(bound, taken),
                    "torch, us": 1e6 * compared if compared else "",
                }
            )


def run(machine: Machine, result: Result) -> None:
    timer = Timer(machine, result)
    shape = TINY if machine.small else LLAMA_8B
    with torch.inference_mode():
        for rows in (4,) if machine.small else (32, 4096):
            _layer_ops(timer, shape, rows)
        _kv_moves(timer, shape, 16 if machine.small else 2048)
        for rows, context in ((2, 20),) if machine.small else ((1, 8192), (32, 1024), (32, 4096)):
            _decode(timer, shape, rows, context)
        for tokens, cached in ((20, 0),) if machine.small else ((2048, 0), (4096, 0), (512, 7680)):
            _chunk(timer, shape, tokens, cached)
        _sampling(timer, shape, 2 if machine.small else 32)


def _layer_ops(timer: Timer, shape: Shape, rows: int) -> None:
    x, residual = timer.random(rows, shape.hidden), timer.random(rows, shape.hidden)
    weight, gate_up = timer.random(shape.hidden), timer.random(rows, 2 * shape.inner)
    line = 2 * rows * shape.hidden
    timer.row(
        f"add_rms_norm, {rows} rows", lambda: kernels.add_rms_norm(x, residual, weight, 1e-5),
        lambda: REFERENCE.add_rms_norm(x, residual, weight, 1e-5), 4 * line,
    )  # fmt: skip
    timer.row(
        f"silu_mul, {rows} rows", lambda: kernels.silu_mul(gate_up),
        lambda: REFERENCE.silu_mul(gate_up), 2 * 3 * rows * shape.inner,
    )  # fmt: skip
    kv = _kv(timer, shape, rows)
    qkv = timer.random(rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    cos, sin = timer.random(2, rows, 1, shape.head_dim // 2)
    slots = torch.randperm(kv.shape[1] * kv.shape[2], device=kv.device)[:rows]
    parts = qkv[:, : -shape.kv_heads], qkv[:, -shape.kv_heads :]
    timer.row(
        f"rotary_kv_write, {rows} rows",
        lambda: kernels.rotary_kv_write(*parts, cos, sin, kv[0], kv[1], slots),
        lambda: REFERENCE.rotary_kv_write(*parts, cos, sin, kv[0], kv[1], slots),
        2 * 2 * qkv.numel(),
    )  # fmt: skip


def _kv(timer: Timer, shape: Shape, tokens: int) -> Tensor:
    """One layer's keys and values of at least `tokens` tokens."""
    return timer.random(2, -(-tokens // 16) + 1, 16, shape.kv_heads, shape.head_dim)


def _kv_moves(timer: Timer, shape: Shape, tokens: int) -> None:
    layers = 8
    kv = timer.random(layers, 2, tokens // 8, 16, shape.kv_heads, shape.head_dim)
    slots = torch.randperm(tokens * 2, device=kv.device)[:tokens]
    moved = 2 * 2 * layers * 2 * tokens * shape.kv_heads * shape.head_dim
    out = kernels.kv_pack(kv, 0, layers, slots)
    timer.row(
        f"kv_pack, {tokens} tokens of {layers} layers",
        lambda: kernels.kv_pack(kv, 0, layers, slots, out),
        lambda: REFERENCE.kv_pack(kv, 0, layers, slots), moved,
    )  # fmt: skip
    timer.row(
        f"kv_unpack, {tokens} tokens of {layers} layers",
        lambda: kernels.kv_unpack(kv, 0, layers, slots, out),
        lambda: REFERENCE.kv_unpack(kv, 0, layers, slots, out), moved,
    )  # fmt: skip


def _batch(timer: Timer, rows: int, cached: int, tokens: int, num_blocks: int) -> RaggedBatch:
    each = -(-(cached + tokens) // 16)
    order = torch.randperm(num_blocks).tolist()
    tables = [order[i * each : (i + 1) * each] for i in range(rows)]
    return RaggedBatch.build(tables, [cached] * rows, [tokens] * rows, 16, timer.machine.device)


def _decode(timer: Timer, shape: Shape, rows: int, context: int) -> None:
    kv = _kv(timer, shape, rows * (context + 16))
    query = timer.random(rows, shape.heads, shape.head_dim)
    batch = _batch(timer, rows, context - 1, 1, kv.shape[1])
    scale = shape.head_dim**-0.5
    nbytes = 2 * 2 * rows * context * shape.kv_heads * shape.head_dim + 4 * query.numel()
    timer.row(
        f"decode attention, {rows} x {context}",
        lambda: kernels.paged_attention(query, kv[0], kv[1], batch, scale),
        lambda: REFERENCE.paged_attention(query, kv[0], kv[1], batch, scale), nbytes,
    )  # fmt: skip


def _chunk(timer: Timer, shape: Shape, tokens: int, cached: int) -> None:
    kv = _kv(timer, shape, cached + tokens + 16)
    query = timer.random(tokens, shape.heads, shape.head_dim)
    batch = _batch(timer, 1, cached, tokens, kv.shape[1])
    scale = shape.head_dim**-0.5
    pairs = tokens * cached + tokens * (tokens + 1) / 2
    flops = 4 * pairs * shape.heads * shape.head_dim
    nbytes = 2 * (2 * query.numel() + 2 * (cached + tokens) * shape.kv_heads * shape.head_dim)
    reference = None
    if not cached:
        q, k, v = (
            timer.random(1, heads, tokens, shape.head_dim)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )

        def reference() -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    timer.row(
        f"chunk attention, {tokens} after {cached}",
        lambda: kernels.paged_attention(query, kv[0], kv[1], batch, scale),
        reference, nbytes, flops,
    )  # fmt: skip


def _sampling(timer: Timer, shape: Shape, rows: int) -> None:
    device = timer.machine.device
    logits = torch.randn(rows, shape.vocab, device=device) * 3
    temperatures = torch.full((rows,), 0.8, device=device)
    seeds = torch.arange(rows, device=device)
    plain = (logits, temperatures, seeds, seeds)
    rules = (
        torch.full((rows,), 40, device=device),
        torch.full((rows,), 0.95, device=device, dtype=torch.float64),
        torch.full((rows,), 0.02, device=device),
    )
    for what, arguments in (("plain", plain), ("top-k, top-p, min-p", (*plain, *rules))):
        timer.row(
            f"sample_tokens, {rows} rows, {what}",
            lambda arguments=arguments: kernels.sample_tokens(*arguments),  # type: ignore[misc]
            lambda arguments=arguments: REFERENCE.sample_tokens(*arguments),  # type: ignore[misc]
            logits.numel() * 4,
        )
