"""Draws tokens without sorting the vocabulary: top-k, top-p, min-p, then Gumbel-max.

Every truncation is a lowest logit to keep (as in the reference). Top-k and top-p find theirs by
bisection over the bits of a float: the largest value such that the tokens at or above it hold k
tokens, or a mass of top_p. No more than the vocabulary's logits is read, none is moved.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_kernels.triton.gumbel import bits_to_gumbel, noise_bits, noise_key

_BLOCK = 4096
_DRAW_BLOCK = 1024


def truncate_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """Set the logits that are not kept to -inf in place.

    logits: float32 [rows, vocab], contiguous, after temperature; top_k: int64 [rows], 0 is off;
    top_p: float64 [rows], 1 is off; min_p: float32 [rows], 0 is off. At least the likeliest token
    of a row is kept.
    """
    ones = torch.ones_like(min_p)
    lowest, best = _lowest_kept(logits, ones, top_k, top_p, min_p, shift=False)
    rows, vocab = logits.shape
    _mask_kernel[(rows, triton.cdiv(vocab, _BLOCK))](
        logits, lowest, best, vocab, BLOCK=_BLOCK, num_warps=8
    )


def sample_tokens(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Return int64 [rows]: argmax of the truncated logits / temperature + noise.

    logits: float32 [rows, vocab], contiguous, left unchanged; temperatures: float32 [rows], above
    0; seeds, positions: int64 [rows]. The other three as for `truncate_logits`, all or none. Of
    equal scores the lowest token id wins.
    """
    rows, vocab = logits.shape
    if top_k is None or top_p is None or min_p is None:
        best = logits.amax(1)
        lowest = torch.full_like(best, float("-inf"))
    else:
        lowest, best = _lowest_kept(logits, temperatures, top_k, top_p, min_p, shift=True)
    parts = triton.cdiv(vocab, _DRAW_BLOCK)
    scores = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    token_ids = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
    _draw_kernel[(rows, parts)](
        logits,
        best,
        lowest,
        temperatures,
        seeds,
        positions,
        scores,
        token_ids,
        vocab,
        parts,
        BLOCK=_DRAW_BLOCK,
        num_warps=4,
    )
    chosen = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _choose_kernel[(rows,)](
        scores, token_ids, chosen, parts, BLOCK=triton.next_power_of_2(parts), num_warps=1
    )
    return chosen


def _lowest_kept(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, shift: bool
) -> tuple[Tensor, Tensor]:
    """Return the lowest scaled logit to keep and the highest unscaled one, float32 [rows].

    Scaled is (logit - highest) / temperature with `shift`, the logit itself without.
    """
    rows, vocab = logits.shape
    best = logits.amax(1)
    lowest = torch.empty_like(best)
    _threshold_kernel[(rows,)](
        logits,
        best,
        temperatures,
        top_k,
        top_p,
        min_p.log(),
        lowest,
        vocab,
        BLOCK=_BLOCK,
        SHIFT=shift,
        num_warps=16,
    )
    return lowest, best


@triton.jit
def _scaled(logits, best, temperature, SHIFT: tl.constexpr):
    """Only differences matter; taken from the maximum, no division can overflow."""
    if SHIFT:
        return tl.div_rn(logits - best, temperature)
    return logits


@triton.jit
def _order(x):
    """uint32 keys in the order of the float32 values."""
    bits = x.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, bits ^ -1, bits ^ -2147483648)
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _value(key):
    """The float32 value of an `_order` key."""
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ -2147483648, bits ^ -1).to(tl.float32, bitcast=True)


@triton.jit
def _mass_from(
    row, vocab, best, temperature, peak, lowest, key, BLOCK: tl.constexpr, SHIFT: tl.constexpr
):
    """How many tokens are at or above `key`, and their softmax mass times a constant; tokens under
    the key `lowest` have none."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < vocab, other=float("-inf"))
        x = _scaled(x, best, temperature, SHIFT)
        order = _order(x)
        kept = (order >= key) & (order >= lowest) & (columns < vocab)
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp(x - peak), 0.0).to(tl.float64)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _threshold_kernel(
    logits,
    bests,
    temperatures,
    top_ks,
    top_ps,
    log_min_ps,
    lowest,
    vocab,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * vocab
    best = tl.load(bests + index)
    temperature = tl.load(temperatures + index)
    top_k = tl.load(top_ks + index)
    top_p = tl.load(top_ps + index)
    peak = _scaled(best, best, temperature, SHIFT)
    floor = tl.full([], 0, tl.uint32)
    if top_k > 0:
        k = tl.minimum(top_k, vocab)
        key = tl.full([], 0, tl.uint32)
        for bit in range(32):
            raised = key | (tl.full([], 0x80000000, tl.uint32) >> bit)
            count, _ = _mass_from(row, vocab, best, temperature, peak, floor, raised, BLOCK, SHIFT)
            key = tl.where(count >= k, raised, key)
        floor = key
    if top_p < 1.0:
        _, total = _mass_from(row, vocab, best, temperature, peak, floor, floor, BLOCK, SHIFT)
        key = tl.full([], 0, tl.uint32)
        for bit in range(32):
            raised = key | (tl.full([], 0x80000000, tl.uint32) >> bit)
            _, mass = _mass_from(row, vocab, best, temperature, peak, floor, raised, BLOCK, SHIFT)
            key = tl.where(mass >= top_p * total, raised, key)
        floor = tl.maximum(key, floor)
    # The key 0 stands for no limit: it is not a number.
    kept = tl.where(floor > 0, _value(floor), float("-inf"))
    kept = tl.maximum(kept, peak + tl.load(log_min_ps + index))
    tl.store(lowest + index, tl.minimum(kept, peak))


@triton.jit
def _mask_kernel(logits, lowest, bests, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    place = logits + row * vocab + columns
    x = tl.load(place, mask=inside, other=0.0)
    tl.store(place, float("-inf"), mask=inside & (x < tl.load(lowest + row)))


@triton.jit
def _draw_kernel(
    logits,
    bests,
    lowest,
    temperatures,
    seeds,
    positions,
    scores,
    token_ids,
    vocab,
    parts,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + columns, mask=columns < vocab, other=float("-inf"))
    x = _scaled(x, tl.load(bests + row), tl.load(temperatures + row), True)
    kept = (columns < vocab) & (x >= tl.load(lowest + row))
    best = float("-inf")
    token_id = part * BLOCK
    if tl.max(kept.to(tl.int32), 0) > 0:
        key = noise_key(tl.load(seeds + row), tl.load(positions + row))
        score = tl.where(kept, x + bits_to_gumbel(noise_bits(key, columns)), float("-inf"))
        best = tl.max(score, 0)
        token_id += tl.argmax(score, 0)
    tl.store(scores + row * parts + part, best)
    tl.store(token_ids + row * parts + part, token_id.to(tl.int64))


@triton.jit
def _choose_kernel(scores, token_ids, chosen, parts, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    score = tl.load(scores + row * parts + columns, mask=columns < parts, other=float("-inf"))
    tl.store(chosen + row, tl.load(token_ids + row * parts + tl.argmax(score, 0)))
