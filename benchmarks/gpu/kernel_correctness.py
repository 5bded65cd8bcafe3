"""Every Triton kernel on this device against the torch reference in float32 on the CPU.

Fresh random inputs for every check, output memory poisoned with NaN, each kernel run twice on the
same inputs: what differs between the two is a race. Integer results must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.harness import Machine, Result, poison, relative_error
from tandem_kernels import RaggedBatch, rotary_tables, uniform_bits
from tandem_kernels import triton as kernels
from tandem_kernels.implementation import REFERENCE

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
Checked = Callable[[Callable[[Tensor], Tensor], Any], Tensor]


class Checker:
    """Runs a kernel and its reference on the same random inputs."""

    def __init__(self, machine: Machine, result: Result, dtype: torch.dtype) -> None:
        self.machine, self.result, self.dtype = machine, result, dtype

    def random(self, *shape: int) -> Tensor:
        """On the CPU, in the kernel's dtype: the reference upcasts the same values."""
        return torch.randn(shape).to(self.dtype)

    def compare(
        self,
        name: str,
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        *inputs: Tensor,
        changed: tuple[int, ...] = (),
    ) -> None:
        """`changed`: the inputs that are results too, because they are written in place."""
        with self.result.guard(f"{name} {self.dtype}"):
            first, second = (self._run(kernel, inputs, changed) for _ in range(2))
            widened = [x.float() if x.is_floating_point() else x.clone() for x in inputs]
            expected = _results(reference(*widened), widened, changed)
            errors = [relative_error(a, b) for a, b in zip(first, expected, strict=True)]
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            tolerance = TOLERANCES[self.dtype]
            good = max(errors) <= tolerance and same
            self.result.check(good, f"{name} {self.dtype}: error {max(errors):.1e}, same {same}")
            self.result.rows.append(
                {
                    "kernel": name,
                    "dtype": str(self.dtype).removeprefix("torch."),
                    "relative error": f"{max(errors):.1e}",
                    "allowed": f"{tolerance:.0e}",
                    "same twice": same,
                    "ok": good,
                }
            )

    def _run(
        self, kernel: Callable[..., Any], inputs: tuple[Tensor, ...], changed: tuple[int, ...]
    ) -> list[Tensor]:
        arguments = [x.to(self.machine.device, copy=True) for x in inputs]
        poison(self.machine, max(x.numel() * x.element_size() for x in arguments))
        results = _results(kernel(*arguments), arguments, changed)
        self.machine.synchronize()
        return [x.cpu() for x in results]


def _results(returned: Any, arguments: list[Tensor], changed: tuple[int, ...]) -> list[Tensor]:
    results = [] if returned is None else [returned] if isinstance(returned, Tensor) else returned
    return [*results, *(arguments[index] for index in changed)]


def run(machine: Machine, result: Result) -> None:
    torch.manual_seed(20)
    dtypes = list(TOLERANCES)
    for dtype in dtypes:
        checker = Checker(machine, result, dtype)
        _layer_ops(checker)
        _kv_moves(checker)
        _attention(checker)
    _sampling(machine, result)


def _layer_ops(check: Checker) -> None:
    rows, hidden, inner = (3, 40, 24) if check.machine.small else (77, 4096, 14336)
    x, residual, weight = (
        check.random(rows, hidden),
        check.random(rows, hidden),
        check.random(hidden),
    )
    check.compare(
        "rms_norm", lambda x, w: kernels.rms_norm(x, w, 1e-5),
        lambda x, w: REFERENCE.rms_norm(x, w, 1e-5), x, weight,
    )  # fmt: skip
    check.compare(
        "add_rms_norm", lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: REFERENCE.add_rms_norm(x, r, w, 1e-5), x, residual, weight,
    )  # fmt: skip
    heads, head_dim = 12, 20
    check.compare(
        "rms_norm of heads", lambda x, w: kernels.rms_norm(x[:, : heads - 2], w, 1e-5),
        lambda x, w: REFERENCE.rms_norm(x[:, : heads - 2], w, 1e-5),
        check.random(rows, heads, head_dim), check.random(heads - 2, head_dim),
    )  # fmt: skip
    check.compare("silu_mul", kernels.silu_mul, REFERENCE.silu_mul, check.random(rows, 2 * inner))


def _kv_moves(check: Checker) -> None:
    heads, kv_heads, head_dim, blocks, size = 8, 4, 16, 5, 4
    if not check.machine.small:
        heads, kv_heads, head_dim, blocks, size = 32, 8, 128, 100, 16
    tokens = blocks * size // 2
    slots = torch.randperm(blocks * size)[:tokens]
    positions = torch.randint(0, 5000, (tokens,))
    cos, sin = rotary_tables(positions, torch.rand(head_dim // 2), check.dtype)
    kv = check.random(3, 2, blocks, size, kv_heads, head_dim)
    qkv = check.random(tokens, heads + 2 * kv_heads, head_dim)

    def fused(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(qkv: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor) -> Tensor:
            parts = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
            return run(*parts, cos, sin, kv[1, 0], kv[1, 1], slots)

        return call

    check.compare(
        "rotary_kv_write", fused(kernels.rotary_kv_write), fused(REFERENCE.rotary_kv_write),
        qkv, cos, sin, kv, slots, changed=(3,),
    )  # fmt: skip
    check.compare("apply_rotary", kernels.apply_rotary, REFERENCE.apply_rotary, qkv, cos, sin)
    key, value = check.random(2, tokens, kv_heads, head_dim)
    check.compare(
        "kv_write", lambda kv, s, k, v: kernels.kv_write(kv[0, 0], kv[0, 1], s, k, v),
        lambda kv, s, k, v: REFERENCE.kv_write(kv[0, 0], kv[0, 1], s, k, v),
        kv, slots, key, value, changed=(0,),
    )  # fmt: skip
    check.compare(
        "kv_pack", lambda kv, s: kernels.kv_pack(kv, 1, 2, s),
        lambda kv, s: REFERENCE.kv_pack(kv, 1, 2, s), kv, slots,
    )  # fmt: skip
    part = kv_heads // 2
    check.compare(
        "kv_pack of heads",
        lambda kv, s: kernels.kv_pack(kv, 1, 2, s, first_head=part, num_heads=part),
        lambda kv, s: REFERENCE.kv_pack(kv[..., part:, :].contiguous(), 1, 2, s), kv, slots,
    )  # fmt: skip
    staging = check.random(2, 2, tokens, kv_heads, head_dim)
    check.compare(
        "kv_unpack", lambda kv, s, st: kernels.kv_unpack(kv, 1, 2, s, st),
        lambda kv, s, st: REFERENCE.kv_unpack(kv, 1, 2, s, st), kv, slots, staging, changed=(0,),
    )  # fmt: skip

    def unpack_heads(kv: Tensor, slots: Tensor, staging: Tensor) -> None:
        kv[1:3].flatten(2, 3)[:, :, slots, :part] = staging

    check.compare(
        "kv_unpack of heads", lambda kv, s, st: kernels.kv_unpack(kv, 1, 2, s, st, first_head=0),
        unpack_heads, kv, slots, staging[..., :part, :].contiguous(), changed=(0,),
    )  # fmt: skip


def _attention(check: Checker) -> None:
    """Decode rows and chunks together, contexts shorter and longer than every tile."""
    mixed = [(0, 1), (0, 9), (40, 1), (13, 6)]
    cases: list[tuple[int, int, int, int | None]] = [(4, 2, 16, None), (6, 1, 20, 5)]
    if not check.machine.small:
        mixed += [(3000, 1), (700, 513), (0, 300), (5000, 1), (1999, 2), (129, 1)]
        cases = [(32, 8, 128, None), (32, 8, 128, 512), (8, 8, 64, None), (14, 2, 64, 100),
                 (4, 2, 20, 7), (4, 1, 256, None)]  # fmt: skip
    for heads, kv_heads, head_dim, window in cases:
        _attend(check, mixed, heads, kv_heads, head_dim, window)


def _attend(
    check: Checker,
    chunks: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    size: int = 16,
) -> None:
    needed = [-(-(start + length) // size) for start, length in chunks]
    order = torch.randperm(sum(needed)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    starts, lengths = zip(*chunks, strict=True)
    kv = check.random(2, sum(needed), size, kv_heads, head_dim)
    query = check.random(sum(lengths), heads, head_dim)

    def call(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend(query: Tensor, kv: Tensor) -> Tensor:
            batch = RaggedBatch.build(tables, starts, lengths, size, query.device)
            return run(query, kv[0], kv[1], batch, head_dim**-0.5, window)

        return attend

    name = f"paged_attention {heads}/{kv_heads} heads of {head_dim}, window {window}"
    check.compare(name, call(kernels.paged_attention), call(REFERENCE.paged_attention), query, kv)


def _sampling(machine: Machine, result: Result) -> None:
    rows, vocab = (3, 500) if machine.small else (16, 128_256)
    device = machine.device
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,))
    positions = torch.randint(0, 2**40, (rows,))
    ids = torch.arange(vocab)
    on_device = seeds.to(device), positions.to(device), ids.to(device)
    with result.guard("uniform_bits"):
        equal = torch.equal(
            kernels.uniform_bits(*on_device).cpu(), uniform_bits(seeds, positions, ids)
        )
        result.check(equal, "uniform_bits differ")
        result.rows.append({"kernel": "uniform_bits", "relative error": "bits", "ok": equal})
    with result.guard("gumbel_noise"):
        noise = kernels.gumbel_noise(*on_device).cpu()
        error = relative_error(noise, REFERENCE.gumbel_noise(seeds, positions, ids))
        result.check(error < 1e-6, f"gumbel_noise: error {error:.1e}")
        result.rows.append(
            {"kernel": "gumbel_noise", "relative error": f"{error:.1e}", "ok": error < 1e-6}
        )
    rules: list[tuple[int, float, float]] = [(0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0)]
    rules += [(40, 0.95, 0.02), (0, 1.0, 0.1)]
    for rule in rules:
        with result.guard(f"sampling {rule}"):
            _sample(machine, result, rule, torch.randn(rows, vocab) * 3, seeds, positions)


def _sample(
    machine: Machine,
    result: Result,
    rule: tuple[int, float, float],
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> None:
    rows = len(logits)
    limits = (
        torch.full((rows,), rule[0]),
        torch.full((rows,), rule[1], dtype=torch.float64),
        torch.full((rows,), rule[2]),
    )
    temperatures = torch.rand(rows) + 0.5
    arguments = (logits, temperatures, seeds, positions, *limits)
    drawn = kernels.sample_tokens(*(x.to(machine.device) for x in arguments)).cpu()
    equal = int((drawn == REFERENCE.sample_tokens(*arguments)).sum())
    kept, expected = logits.to(machine.device), logits.clone()
    kernels.truncate_logits(kept, *(x.to(machine.device) for x in limits))
    REFERENCE.truncate_logits(expected, *limits)
    apart = int((kept.cpu() != expected).sum())
    # Masses are summed in another order: a token at the very edge of the nucleus may differ.
    good = equal == rows and apart <= rows
    result.check(good, f"sampling {rule}: {equal}/{rows} tokens equal, {apart} kept differently")
    result.rows.append(
        {
            "kernel": f"top_k {rule[0]}, top_p {rule[1]}, min_p {rule[2]}",
            "relative error": f"{equal}/{rows} tokens equal, {apart} logits kept differently",
            "ok": good,
        }
    )
