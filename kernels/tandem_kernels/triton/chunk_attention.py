"""Causal attention of prompt chunks, tile by tile with a running softmax.

One program takes a tile of consecutive queries of one sequence and one head (as in FlashAttention;
Dao, 2023). Tiles of keys that every query sees need no mask; only those at the diagonal, and all of
them where there is a window, are masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_kernels.triton.machine import interpreted

_LOG2_E = 1.4426950408889634


def queries_per_tile(longest: int, query: Tensor) -> int:
    """The tile's height for chunks of at most `longest` queries: a power of two from 16 on.

    float32 products do not run on the matrix units and need more registers, hence less of them.
    """
    most = 32 if interpreted(query.device) or query.element_size() > 2 else 128
    return max(16, min(most, triton.next_power_of_2(longest)))


def chunk_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    tiles: tuple[Tensor, Tensor, int],
    query_starts: Tensor,
    query_lens: Tensor,
    context_lens: Tensor,
    output: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Fill the rows of `output` that the tiles (sequences, offsets, queries per tile) cover."""
    heads, head_dim = query.shape[1:]
    block_size, kv_heads = key_cache.shape[1:3]
    sequences, offsets, size = tiles
    block_dim = max(16, triton.next_power_of_2(head_dim))
    _chunk_kernel[(heads, len(sequences))](
        query, key_cache, value_cache, block_tables, sequences, offsets,
        query_starts, query_lens, context_lens, output,
        scale * _LOG2_E, block_tables.stride(0), key_cache.stride(0), query.stride(0),
        query.stride(1), BLOCK_SIZE=block_size, HEADS=heads, KV_HEADS=kv_heads,
        HEAD_DIM=head_dim, BLOCK_DIM=block_dim, ROWS=size, TILE=_keys_per_tile(block_dim, query),
        WINDOW=window or 0,
        WIDEN=interpreted(query.device) and query.dtype == torch.bfloat16,
        num_warps=8 if size >= 128 else 4, num_stages=2,
    )  # fmt: skip


def _keys_per_tile(block_dim: int, query: Tensor) -> int:
    """Keys per step: 64 of 128 half-precision elements, fewer of larger ones."""
    if interpreted(query.device):
        return 32
    return max(16, min(64, 64 * 128 * 2 // (block_dim * query.element_size())))


@triton.jit(do_not_specialize=["table_stride"])
def _chunk_kernel(
    query, key_cache, value_cache, block_tables, tile_sequences, tile_offsets,
    query_starts, query_lens, context_lens, output, scale, table_stride, block_stride,
    query_row, query_head,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    kv_head = head // (HEADS // KV_HEADS)
    sequence = tl.load(tile_sequences + tl.program_id(1))
    offset = tl.load(tile_offsets + tl.program_id(1))
    row = tl.load(query_starts + sequence).to(tl.int64)
    length = tl.load(query_lens + sequence)
    context = tl.load(context_lens + sequence)
    table = block_tables + sequence.to(tl.int64) * table_stride

    member = offset + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    own = (member < length)[:, None] & (columns < HEAD_DIM)[None, :]
    source = query + (row + member[:, None]) * query_row + head * query_head + columns[None, :]
    q = tl.load(source, mask=own, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    position = context - length + member
    first = context - length + offset
    end = tl.minimum(first + ROWS, context)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    seen = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    masked = (first + 1) // TILE
    if WINDOW > 0:
        masked = tl.maximum(first - WINDOW + 1, 0) // TILE
    else:
        for tile in range(masked):
            seen, best, weight = _see_tile(
                q, seen, best, weight, tile, table, key_cache, value_cache, kv_head, position,
                context, scale, block_stride, BLOCK_SIZE, KV_HEADS, HEAD_DIM, BLOCK_DIM, TILE,
                WINDOW, WIDEN, False,
            )  # fmt: skip
    for tile in range(masked, tl.cdiv(end, TILE)):
        seen, best, weight = _see_tile(
            q, seen, best, weight, tile, table, key_cache, value_cache, kv_head, position,
            context, scale, block_stride, BLOCK_SIZE, KV_HEADS, HEAD_DIM, BLOCK_DIM, TILE, WINDOW,
            WIDEN, True,
        )  # fmt: skip

    seen = seen / tl.where(weight > 0.0, weight, 1.0)[:, None]
    target = output + ((row + member[:, None]) * HEADS + head) * HEAD_DIM + columns[None, :]
    tl.store(target, seen.to(output.dtype.element_ty), mask=own)


@triton.jit
def _see_tile(
    q, seen, best, weight, tile, table, key_cache, value_cache, kv_head, position,
    context, scale, block_stride,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax."""
    key_position = tile * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_DIM)
    inside = columns < HEAD_DIM
    if MASKED:
        # Keys past the end may lie in a block that is not this sequence's: they are not read.
        there = key_position < context
        block = tl.load(table + key_position // BLOCK_SIZE, mask=there, other=0)
        key_mask = there[None, :] & inside[:, None]
        value_mask = there[:, None] & inside[None, :]
    else:
        block = tl.load(table + key_position // BLOCK_SIZE)
        key_mask = inside[:, None]
        value_mask = inside[None, :]
    row = (key_position % BLOCK_SIZE * KV_HEADS + kv_head) * HEAD_DIM
    line = block * block_stride + row
    k = tl.load(key_cache + line[None, :] + columns[:, None], mask=key_mask, other=0.0)
    if WIDEN:  # the interpreter cannot multiply bfloat16
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if MASKED:
        visible = key_position[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (key_position[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, 1))
    base = highest
    if MASKED:
        base = tl.where(highest > float("-inf"), highest, 0.0)
    kept = tl.exp2(best - base)
    p = tl.exp2(scores - base[:, None])
    v = tl.load(value_cache + line[:, None] + columns[None, :], mask=value_mask, other=0.0)
    if WIDEN:
        v = v.to(tl.float32)
    seen = seen * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return seen, highest, weight * kept + tl.sum(p, 1)
