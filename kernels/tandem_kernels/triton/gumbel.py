"""The counter-based noise of `tandem_kernels.gumbel` as device functions and as kernels.

The bits are the same to the last one. The logarithms are taken in float64 and rounded once, so that
they do not depend on the device's fast float32 logarithm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def uniform_bits(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Return 32 uniform bits per element as int32 [rows, n]; arguments as in the reference."""
    return _fill(seeds, positions, token_ids, torch.int32)


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Return float32 noise, [rows, n]; arguments as in the reference."""
    return _fill(seeds, positions, token_ids, torch.float32)


def _fill(seeds: Tensor, positions: Tensor, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    rows, n = len(seeds), token_ids.shape[-1]
    out = torch.empty((rows, n), dtype=dtype, device=seeds.device)
    if out.numel():
        _noise_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            seeds.contiguous(),
            positions.contiguous(),
            token_ids.contiguous(),
            out,
            n,
            n if token_ids.dim() == 2 else 0,
            out.numel(),
            BLOCK=_BLOCK,
            BITS=dtype == torch.int32,
            num_warps=4,
        )
    return out


@triton.jit
def _splitmix64(x):
    x = x + tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    x = (x ^ (x >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _lowbias32(x):
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, position):
    """The uint64 key of one row."""
    return _splitmix64(_splitmix64(seed.to(tl.uint64)) + position.to(tl.uint64))


@triton.jit
def noise_bits(key, token_id):
    """uint32 bits of a token under its row's key."""
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    x = low + token_id.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32)
    return _lowbias32(_lowbias32(x) ^ high)


@triton.jit
def bits_to_gumbel(bits):
    """float32 -log(-log(1 - u)), u the upper 31 bits as a float32 fraction in (0, 1)."""
    u = ((bits >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    u = tl.minimum(u, 0.9999999403953552)
    return (-tl.log(-tl.log(1.0 - u.to(tl.float64)))).to(tl.float32)


@triton.jit
def _noise_kernel(
    seeds, positions, token_ids, out, n, row_stride, count, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    row = element // n
    seed = tl.load(seeds + row, mask=inside, other=0)
    position = tl.load(positions + row, mask=inside, other=0)
    token_id = tl.load(token_ids + row * row_stride + element % n, mask=inside, other=0)
    bits = noise_bits(noise_key(seed, position), token_id)
    if BITS:
        tl.store(out + element, bits.to(tl.int32, bitcast=True), mask=inside)
    else:
        tl.store(out + element, bits_to_gumbel(bits), mask=inside)
