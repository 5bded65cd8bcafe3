"""Attention of single queries, with long contexts split over several programs.

One program takes the query heads that share a key head, of one sequence, over one part of its
context: a key is read once for all of them. Parts are merged by their log-sum-exp (as in
Flash-Decoding; Dao et al., 2023). How many parts there are follows from shapes alone and each
program finds its own part from the context length on the device, so a captured graph stays right
as contexts grow. A sequence of context 0 is a padded row: its output is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem_kernels.triton.machine import interpreted, num_processors

_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 32
_MIN_SPLIT_TOKENS = 256
_PROGRAMS_PER_PROCESSOR = 4


def num_splits(rows: int, kv_heads: int, longest: int, device: torch.device) -> int:
    """Into how many parts contexts are cut: enough to fill the device, none needlessly short."""
    wanted = _PROGRAMS_PER_PROCESSOR * num_processors(device)
    shortest = 64 if interpreted(device) else _MIN_SPLIT_TOKENS
    return max(1, min(_MAX_SPLITS, wanted // (rows * kv_heads), triton.cdiv(longest, shortest)))


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    sequences: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    longest: int,
    output: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Fill the rows of `output` that belong to `sequences`, int32 [n], which have one query each.

    longest: the most context tokens that any of them may have.
    """
    rows, (heads, head_dim) = len(sequences), query.shape[1:]
    block_size, kv_heads = key_cache.shape[1:3]
    group = heads // kv_heads
    splits = num_splits(rows, kv_heads, min(longest, window or longest), query.device)
    partial, log_sums = output, output
    if splits > 1:
        shape = (rows, heads, splits)
        partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=query.device)
    block_dim = max(16, triton.next_power_of_2(head_dim))
    _decode_kernel[(kv_heads, rows, splits)](
        query, key_cache, value_cache, block_tables, sequences, query_starts, context_lens,
        output, partial, log_sums,
        scale * _LOG2_E, block_tables.stride(0), key_cache.stride(0), query.stride(0),
        query.stride(1), splits, BLOCK_SIZE=block_size, KV_HEADS=kv_heads,
        GROUP=group, BLOCK_GROUP=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_DIM=block_dim, TILE=_tile(block_dim, query),
        WINDOW=window or 0,
        WIDEN=interpreted(query.device) and query.dtype == torch.bfloat16,
        DIRECT=splits == 1,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(rows, heads)](
            partial, log_sums, sequences, query_starts, output, splits,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_DIM=block_dim, num_warps=1,
        )  # fmt: skip


def _tile(block_dim: int, query: Tensor) -> int:
    """Keys per step: what three pipeline stages of keys and values leave room for."""
    if interpreted(query.device):
        return 32
    return max(16, min(64, 64 * 128 * 2 // (block_dim * query.element_size())))


@triton.jit(do_not_specialize=["table_stride", "splits"])
def _decode_kernel(
    query, key_cache, value_cache, block_tables, sequences, query_starts, context_lens,
    output, partial, log_sums, scale, table_stride, block_stride, query_row, query_head, splits,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, WIDEN: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    index = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(sequences + index)
    row = tl.load(query_starts + sequence).to(tl.int64)
    context = tl.load(context_lens + sequence)
    table = block_tables + sequence.to(tl.int64) * table_stride
    first, first_tile, end_tile = _part(context, split, splits, TILE, WINDOW)

    member = tl.arange(0, BLOCK_GROUP)
    columns = tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + member
    own = (member < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    source = query + row * query_row + head[:, None] * query_head + columns[None, :]
    q = tl.load(source, mask=own, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    best = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_GROUP], tl.float32)
    seen = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for tile in range(first_tile, end_tile):
        seen, best, weight = _see_tile(
            q, seen, best, weight, tile, first, context, table, key_cache, value_cache, kv_head,
            columns, scale, block_stride, BLOCK_SIZE, KV_HEADS, HEAD_DIM, TILE, WIDEN,
        )  # fmt: skip

    seen = seen / tl.where(weight > 0.0, weight, 1.0)[:, None]
    if DIRECT:
        target = output + (row * (KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + columns[None, :]
        tl.store(target, seen.to(output.dtype.element_ty), mask=own)
    else:
        part = (index.to(tl.int64) * (KV_HEADS * GROUP) + head) * splits + split
        tl.store(partial + part[:, None] * HEAD_DIM + columns[None, :], seen, mask=own)
        tl.store(log_sums + part, best + tl.log2(weight), mask=member < GROUP)


@triton.jit
def _part(context, split, splits, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The first token that is seen at all, and the tiles of this program's part."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    first_tile = first // TILE
    end_tile = tl.cdiv(context, TILE)
    share = tl.cdiv(end_tile - first_tile, splits)
    first_tile += split * share
    return first, first_tile, tl.minimum(first_tile + share, end_tile)


@triton.jit
def _see_tile(
    q, seen, best, weight, tile, first, context, table, key_cache, value_cache, kv_head,
    columns, scale, block_stride,
    BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax; every tile has a key that is visible."""
    position = tile * TILE + tl.arange(0, TILE)
    visible = (position >= first) & (position < context)
    block = tl.load(table + position // BLOCK_SIZE, mask=visible, other=0)
    row = (position % BLOCK_SIZE * KV_HEADS + kv_head) * HEAD_DIM
    line = block * block_stride + row
    k = tl.load(
        key_cache + line[None, :] + columns[:, None],
        mask=visible[None, :] & (columns < HEAD_DIM)[:, None],
        other=0.0,
    )
    if WIDEN:  # the interpreter cannot multiply bfloat16
        k = k.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee") * scale
    scores = tl.where(visible[None, :], scores, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, 1))
    kept = tl.exp2(best - highest)
    p = tl.exp2(scores - highest[:, None])
    v = tl.load(
        value_cache + line[:, None] + columns[None, :],
        mask=visible[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    )
    if WIDEN:
        v = v.to(tl.float32)
    weight = weight * kept + tl.sum(p, 1)
    seen = seen * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return seen, highest, weight


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    partial, log_sums, sequences, query_starts, output, splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(query_starts + tl.load(sequences + index)).to(tl.int64)
    columns = tl.arange(0, BLOCK_DIM)
    inside = columns < HEAD_DIM
    first = (index.to(tl.int64) * HEADS + head) * splits
    best = tl.load(log_sums + first)
    weight = tl.where(best > float("-inf"), 1.0, 0.0)
    seen = tl.load(partial + first * HEAD_DIM + columns, mask=inside, other=0.0)
    for part in range(first + 1, first + splits):
        log_sum = tl.load(log_sums + part)
        if log_sum > float("-inf"):
            highest = tl.maximum(best, log_sum)
            kept = tl.exp2(best - highest)
            added = tl.exp2(log_sum - highest)
            values = tl.load(partial + part * HEAD_DIM + columns, mask=inside, other=0.0)
            seen = seen * kept + values * added
            weight = weight * kept + added
            best = highest
    seen = seen / tl.where(weight > 0.0, weight, 1.0)
    target = output + (row * HEADS + head) * HEAD_DIM + columns
    tl.store(target, seen.to(output.dtype.element_ty), mask=inside)
