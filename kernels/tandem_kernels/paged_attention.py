"""Causal attention of a ragged batch over KV held in blocks.

Any mix of decode rows (one query) and prompt chunks, grouped-query heads, optional sliding window.
The keys and values of the batch's own tokens must be in the cache already (`kv_write`).

The torch body gathers the blocks that a query may see and calls scaled-dot-product attention:
decode rows in buckets of similar context length, prompt chunks one by one. What it gathers and
masks depends on the batch and the window only, so it is worked out once and kept in
`RaggedBatch.derived` for the other layers.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from tandem_kernels.ragged_batch import RaggedBatch

_BUCKET_TOKENS = 2048
"""Most context tokens gathered at once: a bucket's keys and values should stay in a core's
cache."""
_BUCKET_SLACK_TOKENS = 64
"""A bucket takes rows while the longest context is at most 1.5 times the shortest plus this."""


class _Group(NamedTuple):
    """Sequences of equal query length that are attended in one call."""

    rows: Tensor | slice
    num_sequences: int
    query_len: int
    blocks: Tensor
    """int64 [num_sequences * blocks per sequence]"""
    num_keys: int
    mask: Tensor | None
    """Added to the scores, [num_sequences, 1, query_len, num_keys]; None: plain causal."""


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: RaggedBatch,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return the attention output, [tokens, heads, head_dim].

    query: [tokens, heads, head_dim]; caches: [num_blocks, block_size, kv_heads, head_dim], heads a
    multiple of kv_heads. With a window, the token at position p sees positions p - window + 1 to p.
    """
    plan_key = ("paged_attention", window, query.dtype)
    if plan_key not in batch.derived:
        batch.derived[plan_key] = _plan(batch, window, query.dtype)
    groups = cast(list[_Group], batch.derived[plan_key])
    if len(groups) == 1 and isinstance(groups[0].rows, slice):
        return _attend(query, key_cache, value_cache, groups[0], scale)
    output = torch.empty_like(query)
    for group in groups:
        output[group.rows] = _attend(query[group.rows], key_cache, value_cache, group, scale)
    return output


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, group: _Group, scale: float
) -> Tensor:
    kv_heads, head_dim = key_cache.shape[2:]
    heads = query.shape[1]
    per_sequence = (group.num_sequences, -1, kv_heads, head_dim)
    # [sequences, kv_heads, keys, head_dim], strided views of the gathered blocks
    keys = key_cache.index_select(0, group.blocks).view(per_sequence).transpose(1, 2)
    values = value_cache.index_select(0, group.blocks).view(per_sequence).transpose(1, 2)
    if group.query_len == 1:
        # The heads that share a key head stand where queries would: each key is read once.
        queries = query.view(group.num_sequences, kv_heads, heads // kv_heads, head_dim)
        output = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=group.mask, scale=scale
        )
        return output.reshape(query.shape)
    output = functional.scaled_dot_product_attention(
        query.view(group.num_sequences, group.query_len, heads, head_dim).transpose(1, 2),
        keys[:, :, : group.num_keys],
        values[:, :, : group.num_keys],
        attn_mask=group.mask,
        is_causal=group.mask is None,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return output.transpose(1, 2).reshape(query.shape)


def _plan(batch: RaggedBatch, window: int | None, dtype: torch.dtype) -> list[_Group]:
    decodes, groups = [], []
    for index in range(batch.num_sequences):
        query_len = batch.query_starts[index + 1] - batch.query_starts[index]
        if query_len == 1:
            decodes.append(index)
        elif query_len > 1:
            groups.append(_chunk(batch, index, query_len, window, dtype))
    groups.extend(
        _decode_bucket(batch, bucket, window, dtype) for bucket in _buckets(batch, decodes, window)
    )
    return groups


def _first_block(batch: RaggedBatch, start: int, window: int | None) -> int:
    """The first block that the query at position `start` may see."""
    return 0 if window is None else max(0, start - window + 1) // batch.block_size


def _num_blocks(batch: RaggedBatch, index: int, window: int | None) -> int:
    context = batch.context_lens[index]
    return -(-context // batch.block_size) - _first_block(batch, context - 1, window)


def _buckets(batch: RaggedBatch, decodes: list[int], window: int | None) -> list[list[int]]:
    """Split decode sequences so that little is padded and little is gathered at once."""
    buckets: list[list[int]] = []
    shortest = 0
    for blocks, index in sorted((_num_blocks(batch, index, window), index) for index in decodes):
        tokens = blocks * batch.block_size
        fits = tokens <= 1.5 * shortest + _BUCKET_SLACK_TOKENS
        if buckets and fits and tokens * (len(buckets[-1]) + 1) <= _BUCKET_TOKENS:
            buckets[-1].append(index)
        else:
            buckets.append([index])
            shortest = tokens
    return buckets


def _decode_bucket(
    batch: RaggedBatch, bucket: list[int], window: int | None, dtype: torch.dtype
) -> _Group:
    device = batch.block_tables.device
    bucket = sorted(bucket)
    contexts = torch.tensor([batch.context_lens[i] for i in bucket], device=device)
    firsts = [_first_block(batch, batch.context_lens[i] - 1, window) for i in bucket]
    width = max(_num_blocks(batch, i, window) for i in bucket)
    first = torch.tensor(firsts, device=device)
    # [sequences, width]: block numbers within each sequence; past the table's end its first block
    columns = first[:, None] + torch.arange(width, device=device)
    columns = torch.where(columns < batch.block_tables.shape[1], columns, 0)
    sequences = torch.tensor(bucket, device=device)
    blocks = batch.block_tables[sequences[:, None], columns].flatten()
    positions = (first * batch.block_size)[:, None] + torch.arange(
        width * batch.block_size, device=device
    )
    visible = positions < contexts[:, None]
    if window is not None:
        visible &= positions >= contexts[:, None] - window
    rows = [batch.query_starts[i] for i in bucket]
    return _Group(
        rows=_as_rows(rows, device),
        num_sequences=len(bucket),
        query_len=1,
        blocks=blocks,
        num_keys=width * batch.block_size,
        mask=_additive(visible, dtype)[:, None, None],
    )


def _chunk(
    batch: RaggedBatch, index: int, query_len: int, window: int | None, dtype: torch.dtype
) -> _Group:
    end = batch.context_lens[index]
    start = end - query_len
    first = _first_block(batch, start, window)
    last = -(-end // batch.block_size)
    num_keys = end - first * batch.block_size
    mask = None
    if start > 0 or (window is not None and end > window):
        device = batch.block_tables.device
        queries = torch.arange(start, end, device=device)[:, None]
        keys = torch.arange(first * batch.block_size, end, device=device)
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        mask = _additive(visible, dtype)[None, None]
    row = batch.query_starts[index]
    return _Group(
        rows=slice(row, row + query_len),
        num_sequences=1,
        query_len=query_len,
        blocks=batch.block_tables[index, first:last],
        num_keys=num_keys,
        mask=mask,
    )


def _as_rows(rows: list[int], device: torch.device) -> Tensor | slice:
    """A slice where the rows follow each other: slicing copies nothing."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )
