"""Rotary embedding of queries and keys, fused with writing keys and values to their cache slots.

One program takes a few heads of one token. A negative slot marks a padded row: nothing is written
for it. The rotation is computed in float32 and rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS_PER_PROGRAM = 8


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x rotated. x: [tokens, heads, head_dim]; cos, sin: [tokens, 1, head_dim / 2]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = _with_contiguous_heads(x)
    # The pointers that stand for keys, values, caches and slots are not followed: no KV heads.
    _launch(x, x[:, :0], x[:, :0], cos, sin, x, x, cos, out)
    return out


def rotary_kv_write(
    heads: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Return the rotated queries; write the rotated keys and the values at `slots` in place.

    heads: [tokens, heads + kv_heads, head_dim], queries then keys; value: [tokens, kv_heads,
    head_dim], both with contiguous heads and any other strides; caches: [num_blocks, block_size,
    kv_heads, head_dim], of any block stride; slots: int64 [tokens].
    """
    heads, value = _with_contiguous_heads(heads), _with_contiguous_heads(value)
    num_heads = heads.shape[1] - value.shape[1]
    query, key = heads[:, :num_heads], heads[:, num_heads:]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _launch(query, key, value, cos, sin, key_cache, value_cache, slots, out)
    return out


def _with_contiguous_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    out: Tensor,
) -> None:
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    if not tokens:
        return
    _rotary_kernel[(tokens, triton.cdiv(heads + kv_heads, _HEADS_PER_PROGRAM))](
        query, key, value, cos.contiguous(), sin.contiguous(), key_cache, value_cache, slots, out,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], key_cache.stride(0),
        BLOCK_SIZE=key_cache.shape[1], HEADS=heads, KV_HEADS=kv_heads,
        HALF=head_dim // 2, BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_HEADS=_HEADS_PER_PROGRAM, num_warps=2,
    )  # fmt: skip


@triton.jit
def _rotary_kernel(
    query, key, value, cos, sin, key_cache, value_cache, slots, out,
    query_row, query_head, key_row, key_head, value_row, value_head, block_stride,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    inside = columns < HALF
    angle = token * HALF + columns
    cosine = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)

    is_query = (head < HEADS)[:, None] & inside
    source = query + token * query_row + head[:, None] * query_head + columns
    first = tl.load(source, mask=is_query, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=is_query, other=0.0).to(tl.float32)
    target = out + (token * HEADS + head[:, None]) * (2 * HALF) + columns
    dtype = out.dtype.element_ty
    tl.store(target, (first * cosine - second * sine).to(dtype), mask=is_query)
    tl.store(target + HALF, (second * cosine + first * sine).to(dtype), mask=is_query)

    if KV_HEADS > 0:
        slot = tl.load(slots + token)
        kv_head = head[:, None] - HEADS
        kv_end = tl.where(slot >= 0, KV_HEADS, 0)
        is_key = (kv_head >= 0) & (kv_head < kv_end) & inside
        source = key + token * key_row + kv_head * key_head + columns
        first = tl.load(source, mask=is_key, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=is_key, other=0.0).to(tl.float32)
        place = slot // BLOCK_SIZE * block_stride + columns
        place += (slot % BLOCK_SIZE * KV_HEADS + kv_head) * (2 * HALF)
        tl.store(key_cache + place, (first * cosine - second * sine).to(dtype), mask=is_key)
        tl.store(key_cache + place + HALF, (second * cosine + first * sine).to(dtype), mask=is_key)
        source = value + token * value_row + kv_head * value_head + columns
        first = tl.load(source, mask=is_key, other=0.0)
        second = tl.load(source + HALF, mask=is_key, other=0.0)
        tl.store(value_cache + place, first, mask=is_key)
        tl.store(value_cache + place + HALF, second, mask=is_key)
