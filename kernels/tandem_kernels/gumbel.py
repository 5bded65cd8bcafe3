"""Counter-based Gumbel noise: a pure function of (seed, position, token id).

Sampling is `argmax(logits / temperature + noise)`, which draws from the softmax (Gumbel-max;
Maddison et al., "A* Sampling", 2014). As no generator carries state, a token draws the same noise
on every device, in every batch and after any resumption.

The bits are integer hashes and equal everywhere to the last bit: SplitMix64 (Steele et al., "Fast
Splittable Pseudorandom Number Generators", 2014) makes a 64-bit key of seed and position; two
rounds of Wellons' `lowbias32` permutation hash the token id under the key's halves. The logarithms
that follow are float32 and may differ between devices in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 16
"""Rows are hashed in blocks of about this many elements, so that the passes stay in cache."""


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Return float32 noise, [rows, n].

    seeds, positions: int64 [rows], seeds as the two's complement of an unsigned 64-bit number;
    token_ids: integers [n] for the same ids in every row, or [rows, n].
    """
    bits = uniform_bits(seeds, positions, token_ids)
    noise = torch.empty(bits.shape, dtype=torch.float32, device=bits.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, bits.shape[1]))
    for row in range(0, bits.shape[0], step):
        bits_to_gumbel(bits[row : row + step], noise[row : row + step])
    return noise


def uniform_bits(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Return 32 uniform bits per element as int32 [rows, n]; arguments as in `gumbel_noise`."""
    keys = _splitmix64(_splitmix64(seeds) + positions)
    low, high = _low_int32(keys)[:, None], _low_int32(keys >> 32)[:, None]
    spread = token_ids.to(torch.int32) * _signed(0x9E3779B9, 32)
    bits = torch.add(low, spread)
    step = max(1, _BLOCK_ELEMENTS // max(1, bits.shape[1]))
    for row in range(0, bits.shape[0], step):
        block = bits[row : row + step]
        _lowbias32(block)
        block ^= high[row : row + step]
        _lowbias32(block)
    return bits


def bits_to_gumbel(bits: Tensor, out: Tensor) -> None:
    """Fill `out` with -log(-log(1 - u)), u the upper 31 bits as a fraction in (0, 1).

    Always finite. Noise is large where u is small; there a float32 keeps its full relative
    precision.
    """
    out.copy_((bits >> 1) & 0x7FFFFFFF)
    out.add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    out.neg_().log1p_().neg_().log_().neg_()


def _splitmix64(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15, 64)
    x = (x ^ _shift_right(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift_right(x, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift_right(x, 31, 64)


def _lowbias32(x: Tensor) -> None:
    """Hash int32 in place."""
    x ^= _shift_right(x, 16, 32)
    x *= _signed(0x7FEB352D, 32)
    x ^= _shift_right(x, 15, 32)
    x *= _signed(0x846CA68B, 32)
    x ^= _shift_right(x, 16, 32)


def _shift_right(x: Tensor, count: int, width: int) -> Tensor:
    """Shift in zeros, as an unsigned integer would."""
    return (x >> count).bitwise_and_((1 << (width - count)) - 1)


def _low_int32(x: Tensor) -> Tensor:
    low = x & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >= 1 << (width - 1) else value
