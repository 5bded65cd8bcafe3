"""Random calls of every C++ kernel, checked against the torch reference. Also a program.

As a program it runs calls with a library that it is given, which may be one that was built with
sanitizers: `python cpu_cases.py LIBRARY NUM_CASES FIRST_SEED`.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tandem_kernels import RaggedBatch, gumbel_noise, truncate_logits
from tandem_kernels.cpu import Context, pack_gate_up, pack_linear
from tandem_kernels.cpu import operations as ops
from tandem_kernels.cpu.decoder import CompiledDecoder, PackedLayer, PackedModel
from tandem_kernels.cpu.library import open_library
from tandem_kernels.kv_pack import kv_pack, kv_unpack
from tandem_kernels.paged_attention import paged_attention
from tandem_kernels.rms_norm import rms_norm
from tandem_kernels.rotary import apply_rotary, rotary_tables

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Relative error that rounding a result to the dtype, and a few more operations, may leave."""


class Source:
    """Random numbers, sizes and tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, low: int, high: int) -> int:
        """Return a number in [low, high]; small ones more often."""
        spread = torch.rand(1, generator=self.generator).item() ** 2
        return low + int(spread * (high - low + 1))

    def one_of(self, *choices: object) -> object:
        return choices[int(torch.randint(len(choices), (1,), generator=self.generator))]

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers, on a scale that differs from tensor to tensor, some of them zero."""
        values = torch.randn(*shape, generator=self.generator)
        scale = self.one_of(1.0, 1.0, 1e-3, 30.0)
        keep = torch.rand(*shape, generator=self.generator) < float(self.one_of(1.0, 0.5))  # type: ignore[arg-type]
        return (values * scale * keep).to(dtype)

    def laid_out(self, kv: Tensor) -> Tensor:
        """The same KV, [..., num_blocks, block_size, kv_heads, head_dim], plane by plane or, as
        workers keep it, block by block."""
        if self.one_of(0, 1):
            return kv
        return kv.movedim(-4, 0).contiguous().movedim(0, -4)

    def dtype(self) -> torch.dtype:
        return torch.float32 if self.one_of(0, 1) else torch.bfloat16

    def batch(self, num_blocks: int, block_size: int, longest: int) -> RaggedBatch:
        """Some sequences: decode rows and chunks, at the start or after a context."""
        order = torch.randperm(num_blocks, generator=self.generator).tolist()
        tables, starts, lengths = [], [], []
        for _ in range(self.integer(1, 6)):
            start = self.integer(0, longest)
            length = 1 if self.one_of(0, 1) else self.integer(1, longest)
            needed = -(-(start + length) // block_size)
            if needed > len(order):
                break
            tables.append([order.pop() for _ in range(needed)])
            starts.append(start)
            lengths.append(length)
        return RaggedBatch.build(tables, starts, lengths, block_size)


def close(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    error = (actual.double() - expected.double()).abs()
    assert (error <= bound).all(), f"off by {error.max()}, allowed {bound}"


def check_linear(context: Context, source: Source) -> None:
    dtype = source.dtype()
    rows, outputs, inputs = (
        source.integer(1, 60),
        source.integer(1, 200),
        2 * source.integer(1, 150),
    )
    x, weight = (
        source.tensor(rows, inputs, dtype=dtype),
        source.tensor(outputs, inputs, dtype=dtype),
    )
    bias = source.tensor(outputs, dtype=dtype) if source.one_of(0, 1) else None
    actual = ops.linear(context, pack_linear(context, weight, bias), x)
    wide = None if bias is None else bias.double()
    expected = torch.nn.functional.linear(x.double(), weight.double(), wide)
    magnitude = torch.nn.functional.linear(
        x.double().abs(), weight.double().abs(), None if wide is None else wide.abs()
    )
    close(actual, expected, 1e-6 * inputs**0.5 * magnitude + 1e-20)
    first = ops.linear(context, pack_linear(context, weight, bias), x[:1])
    assert torch.equal(first[0], actual[0]), "a row depends on how many there are"


def check_silu_linear(context: Context, source: Source) -> None:
    dtype = source.dtype()
    rows, inner, inputs = source.integer(1, 40), source.integer(1, 100), 2 * source.integer(1, 60)
    x = source.tensor(rows, inputs, dtype=dtype)
    weight = source.tensor(2 * inner, inputs, dtype=dtype) / inputs**0.5
    bias = source.tensor(2 * inner, dtype=dtype) if source.one_of(0, 1) else None
    actual = ops.silu_linear(context, pack_gate_up(context, weight, bias), x)
    both = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    gate, up = both.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    size = x.double().abs().amax() * weight.double().abs().amax() * inputs + 1
    close(actual, expected, EPSILON[dtype] * expected.abs() + 1e-6 * (1 + up.abs()) * size)


def check_rms_norm(context: Context, source: Source) -> None:
    dtype = source.dtype()
    rows, width = source.integer(1, 20), source.integer(1, 300)
    x, weight = source.tensor(rows, width), source.tensor(width, dtype=dtype)
    expected = rms_norm(x.double(), weight.double(), 1e-6)
    close(ops.rms_norm(context, x, weight, 1e-6), expected, EPSILON[dtype] * expected.abs() + 1e-9)


def check_rotary(context: Context, source: Source) -> None:
    dtype, head_dim = source.dtype(), 2 * source.integer(1, 64)
    kv_heads, block_size = source.integer(1, 4), source.integer(1, 16)
    heads = kv_heads * source.integer(1, 4)
    batch = source.batch(64, block_size, 40)
    cache = source.laid_out(torch.zeros(2, 64, block_size, kv_heads, head_dim, dtype=dtype))
    projected = source.tensor(batch.num_tokens, heads + 2 * kv_heads, head_dim)
    norm = source.tensor(heads + kv_heads, head_dim, dtype=dtype) if source.one_of(0, 1) else None
    frequencies = 1e4 ** -torch.linspace(0, 1, head_dim // 2)
    query = ops.rotary_kv_write(
        context, projected, cache[0], cache[1], batch, frequencies, norm, 1e-6
    )
    rotated, value = projected.split([heads + kv_heads, kv_heads], dim=1)
    if norm is not None:
        rotated = rms_norm(rotated, norm.float(), 1e-6)
    cos, sin = rotary_tables(batch.positions, frequencies, torch.float32)
    expected = apply_rotary(rotated, cos, sin)
    # Rotation mixes the two elements of a pair.
    bound = EPSILON[dtype] * (rotated.abs() + rotated.roll(head_dim // 2, -1).abs()) + 1e-6
    close(query, expected[:, :heads], bound[:, :heads])
    written = cache.flatten(1, 2)[:, batch.slots]
    close(written[0], expected[:, heads:], bound[:, heads:])
    assert torch.equal(written[1], value.to(dtype))
    assert cache.flatten(1, 2).abs().sum((0, 2, 3)).count_nonzero() <= batch.num_tokens


def check_attention(context: Context, source: Source) -> None:
    dtype, head_dim = source.dtype(), 2 * source.integer(1, 64)
    kv_heads, block_size = source.integer(1, 4), source.integer(1, 32)
    heads = kv_heads * source.integer(1, 8)
    batch = source.batch(64, block_size, 300)
    if not batch.num_tokens:
        return
    query = source.tensor(batch.num_tokens, heads, head_dim, dtype=dtype)
    cache = source.laid_out(source.tensor(2, 64, block_size, kv_heads, head_dim, dtype=dtype))
    window = None if source.one_of(0, 1) else source.integer(1, 200)
    scale = head_dim**-0.5 / (1 + float(query.abs().max() * cache[0].abs().max()))
    actual = ops.paged_attention(context, query, cache[0], cache[1], batch, scale, window)
    expected = paged_attention(
        query.double(), cache[0].double(), cache[1].double(), batch, scale, window
    )
    close(actual, expected, EPSILON[dtype] * float(cache[1].abs().max()) + 1e-20)


def check_choice(context: Context, source: Source) -> None:
    rows, vocab = source.integer(1, 6), source.integer(1, 40000)
    logits = source.tensor(rows, vocab)
    assert torch.equal(ops.argmax(context, logits), logits.argmax(1))
    temperatures = torch.rand(rows, generator=source.generator) * 2 + 0.01
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=source.generator)
    positions = torch.randint(0, 10000, (rows,), generator=source.generator)
    drawn = ops.sample_tokens(context, logits, temperatures, seeds, positions)
    scaled = (logits - logits.amax(1, keepdim=True)) / temperatures[:, None]
    noisy = scaled + gumbel_noise(seeds, positions, torch.arange(vocab))
    # The logarithms may differ in the last place, so a near tie may go either way.
    chosen = noisy.gather(1, drawn[:, None])[:, 0]
    close(chosen, noisy.amax(1), 1e-5 * (1 + noisy.amax(1).abs()))


def check_truncated_draw(context: Context, source: Source) -> None:
    rows, vocab = source.integer(1, 5), source.integer(1, 30000)
    logits = source.tensor(rows, vocab)
    logits[torch.rand(rows, vocab, generator=source.generator) < float(source.one_of(0, 0.3))] = (  # type: ignore[arg-type]
        float("-inf")
    )
    logits[:, source.integer(0, vocab - 1)] = 1.0

    def column(dtype: torch.dtype, *choices: float) -> Tensor:
        return torch.tensor([source.one_of(*choices) for _ in range(rows)], dtype=dtype)

    temperatures = torch.rand(rows, generator=source.generator) * 2 + 0.01
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=source.generator)
    positions = torch.randint(0, 10000, (rows,), generator=source.generator)
    top_k = column(torch.int64, 0, 1, 7, 50, 3000, vocab, 10**6)
    top_p = column(torch.float64, 1.0, 1e-9, 0.3, 0.9, 0.999)
    min_p = column(torch.float32, 0.0, 1e-4, 0.2, 1.0)
    given = (temperatures, seeds, positions, top_k, top_p, min_p)
    drawn = ops.sample_tokens(context, logits, *given)
    # Sums over a vocabulary and logarithms may differ in their last places: a mass at the very edge
    # of top_p, or a near tie, may go either way.
    best = []
    for slack in (1 - 1e-5, 1, 1 + 1e-5):
        scaled = (logits - logits.amax(1, keepdim=True)) / temperatures[:, None]
        truncate_logits(scaled, top_k, torch.where(top_p < 1, top_p * slack, top_p), min_p)
        noisy = scaled + gumbel_noise(seeds, positions, torch.arange(vocab))
        chosen, most = noisy.gather(1, drawn[:, None])[:, 0], noisy.amax(1)
        best.append((chosen - most).abs() <= 1e-5 * (1 + most.abs()))
    assert torch.stack(best).any(0).all(), f"drew {drawn.tolist()} by {given}"
    alone = [
        ops.sample_tokens(context, logits[[i]], *(part[[i]] for part in given)) for i in range(rows)
    ]
    assert torch.equal(torch.cat(alone), drawn), "a draw depends on its batch"


def check_kv_copy(context: Context, source: Source) -> None:
    layers, blocks, block_size = source.integer(1, 4), source.integer(1, 12), source.integer(1, 8)
    heads, head_dim = source.integer(1, 3), source.integer(1, 40)
    kv = source.tensor(layers, 2, blocks, block_size, heads, head_dim, dtype=source.dtype())
    kv = source.laid_out(kv)
    slots = torch.randperm(blocks * block_size, generator=source.generator)
    slots = slots[: source.integer(0, len(slots))]
    if source.one_of(0, 1):
        slots = slots.sort().values
    first = source.integer(0, layers - 1)
    count = source.integer(1, layers - first)
    packed = ops.kv_pack(kv, first, count, slots)
    assert torch.equal(packed, kv_pack(kv, first, count, slots))
    ours, expected = torch.zeros_like(kv), torch.zeros_like(kv)
    ops.kv_unpack(ours, first, count, slots, packed)
    kv_unpack(expected, first, count, slots, packed)
    assert torch.equal(ours, expected)


def check_forward(context: Context, source: Source) -> None:
    """A batch at once gives the bits that its sequences give one after the other."""
    model = random_model(context, source)
    decoder = CompiledDecoder(context, model)
    block_size, dtype = source.integer(1, 16), model.final_norm.dtype
    batch = source.batch(64, block_size, 150)
    shape = (len(model.layers), 2, 64, block_size, model.num_kv_heads, model.head_dim)
    kv = source.laid_out(source.tensor(*shape, dtype=dtype))
    token_ids = torch.randint(
        model.embedding.outputs, (batch.num_tokens,), generator=source.generator
    )
    together, apart = kv.clone(), kv.clone()
    hidden = decoder.forward(token_ids, batch, together, None)
    for index in range(batch.num_sequences):
        rows = slice(batch.query_starts[index], batch.query_starts[index + 1])
        length = rows.stop - rows.start
        alone = RaggedBatch.build(
            [batch.block_tables[index].tolist()],
            [batch.context_lens[index] - length],
            [length],
            block_size,
        )
        wanted = torch.tensor([length - 1])
        own = decoder.forward(
            token_ids[rows].clone(), alone, apart, wanted, lambda _: None, range(len(model.layers))
        )
        assert torch.equal(own[0], hidden[rows][-1]), "a token depends on its batch"
        assert torch.equal(decoder.logits(own), decoder.logits(hidden[rows][-1:]))
    assert torch.equal(together, apart)


def random_model(context: Context, source: Source) -> PackedModel:
    dtype, kv_heads = source.dtype(), source.integer(1, 3)
    heads, head_dim = kv_heads * source.integer(1, 4), 2 * source.integer(1, 20)
    hidden, inner, vocab = 2 * source.integer(1, 60), 2 * source.integer(1, 60), 50

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=source.generator) / shape[-1] ** 0.5).to(dtype)

    def layer() -> PackedLayer:
        qkv = matrix((heads + 2 * kv_heads) * head_dim, hidden)
        return PackedLayer(
            attention_norm=torch.ones(hidden, dtype=dtype),
            feed_forward_norm=torch.ones(hidden, dtype=dtype),
            head_norm=None,
            qkv=pack_linear(context, qkv, matrix(len(qkv))),
            output=pack_linear(context, matrix(hidden, heads * head_dim), None),
            gate_up=pack_gate_up(context, matrix(2 * inner, hidden), None),
            down=pack_linear(context, matrix(hidden, inner), None),
            window=None if source.one_of(0, 1) else source.integer(1, 100),
        )

    embedding = pack_linear(context, matrix(vocab, hidden), None)
    return PackedModel(
        layers=[layer() for _ in range(source.integer(1, 3))],
        embedding=embedding,
        final_norm=torch.ones(hidden, dtype=dtype),
        head=embedding,
        inverse_frequencies=1e4 ** -torch.linspace(0, 1, head_dim // 2),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        inner=inner,
        eps=1e-6,
    )


CASES: dict[str, Callable[[Context, Source], None]] = {
    "linear": check_linear,
    "silu_linear": check_silu_linear,
    "rms_norm": check_rms_norm,
    "rotary": check_rotary,
    "attention": check_attention,
    "choice": check_choice,
    "truncated_draw": check_truncated_draw,
    "kv_copy": check_kv_copy,
    "forward": check_forward,
}


INSTRUCTION_SETS = (
    "C++ (AMX bf16)",
    "C++ (AMX bf16, emulated)",
    "C++ (AVX-512 bf16)",
    "C++ (AVX-512)",
    "C++ (AVX2)",
    "C++ (baseline)",
)


def contexts_of(library: ctypes.CDLL) -> list[Context]:
    """A context for every instruction set of this machine, on one and on two threads."""
    contexts = []
    for name in INSTRUCTION_SETS:
        with contextlib.suppress(RuntimeError):  # not a set of this machine
            contexts.extend(Context(threads, name, library) for threads in (1, 2))
    return contexts


def main(library: str, num_cases: str, first_seed: str) -> None:
    torch.set_num_threads(1)
    loaded = open_library(Path(library))
    contexts = contexts_of(loaded)
    for seed in range(int(first_seed), int(first_seed) + int(num_cases)):
        for name, check in CASES.items():
            print(f"{name}, seed {seed}", flush=True)
            check(contexts[seed % len(contexts)], Source(seed))


if __name__ == "__main__":
    main(*sys.argv[1:])
