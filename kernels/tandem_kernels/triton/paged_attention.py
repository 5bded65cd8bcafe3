"""Causal attention of a ragged batch over KV held in blocks: which kernel takes which rows.

Decode rows (one query) go to `decode_attention`, prompt chunks to `chunk_attention`, or to
FlashInfer where a measurement at the first chunk found it faster. What follows from the batch alone
is worked out once, as an `AttentionPlan`, and kept in `RaggedBatch.derived` for the other layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import triton
from torch import Tensor

from tandem_kernels import flashinfer_attention
from tandem_kernels.ragged_batch import RaggedBatch
from tandem_kernels.triton.chunk_attention import chunk_attention, queries_per_tile
from tandem_kernels.triton.decode_attention import decode_attention

_KEY = "triton.paged_attention"
_flashinfer: dict[tuple[object, ...], bool] = {}
"""Whether FlashInfer attends prompt chunks, by type of query and KV."""


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Index tensors of one iteration, int32 on the batch's device."""

    context_lens: Tensor
    """[sequences]"""
    query_starts: Tensor
    """[sequences]: first row of each."""
    query_lens: Tensor
    """[sequences]"""
    decode_sequences: Tensor
    """Sequences with one query."""
    longest_decode: int
    """Most context tokens of any of them."""
    tile_sequences: Tensor
    """The sequence of each tile of prompt queries."""
    tile_offsets: Tensor
    """The tile's first query, counted within its sequence's chunk."""
    tile_size: int

    @classmethod
    def of(cls, batch: RaggedBatch, query: Tensor) -> AttentionPlan:
        """The batch's plan, made at the first call."""
        if _KEY not in batch.derived:
            batch.derived[_KEY] = cls._make(batch, query)
        return cast(AttentionPlan, batch.derived[_KEY])

    def attach(self, batch: RaggedBatch) -> None:
        """Make this the batch's plan."""
        batch.derived[_KEY] = self

    @classmethod
    def _make(cls, batch: RaggedBatch, query: Tensor) -> AttentionPlan:
        starts, contexts = batch.query_starts, batch.context_lens
        lens = [end - start for start, end in pairwise(starts)]
        decodes = [index for index, length in enumerate(lens) if length == 1]
        device = batch.block_tables.device
        size = queries_per_tile(max((n for n in lens if n > 1), default=0), query)
        tiles = [
            (index, offset)
            for index, length in enumerate(lens)
            if length > 1
            for offset in range(0, length, size)
        ]
        # The tiles that read most come first, so that the last to finish are short ones.
        tiles.sort(key=lambda tile: lens[tile[0]] - contexts[tile[0]] - tile[1])
        columns = _upload(
            [
                contexts,
                starts[:-1],
                lens,
                decodes,
                [tile[0] for tile in tiles],
                [tile[1] for tile in tiles],
            ],
            device,
        )
        context_lens, query_starts, query_lens, decode_sequences, sequences, offsets = columns
        return cls(
            context_lens=context_lens,
            query_starts=query_starts,
            query_lens=query_lens,
            decode_sequences=decode_sequences,
            longest_decode=max((contexts[index] for index in decodes), default=0),
            tile_sequences=sequences,
            tile_offsets=offsets,
            tile_size=size,
        )


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
    plan = AttentionPlan.of(batch, query)
    query = query if query.stride(-1) == 1 else query.contiguous()
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if len(plan.decode_sequences):
        decode_attention(
            query,
            key_cache,
            value_cache,
            batch.block_tables,
            plan.decode_sequences,
            plan.query_starts,
            plan.context_lens,
            plan.longest_decode,
            output,
            scale,
            window,
        )
    if len(plan.tile_sequences):
        attend = _choose_chunk_kernel(query, key_cache)
        chunks = [i for i, (row, end) in enumerate(pairwise(batch.query_starts)) if end - row > 1]
        attend(query, key_cache, value_cache, batch, chunks, output, scale, window)
    return output


def describe_chunk_kernels() -> str:
    """What attends prompt chunks beside our own kernel, for people to read; empty: nothing."""
    return flashinfer_attention.describe() if any(_flashinfer.values()) else ""


def _choose_chunk_kernel(query: Tensor, key_cache: Tensor) -> flashinfer_attention.Attend:
    if not flashinfer_attention.is_candidate(query):
        return _attend_chunks
    kind = (query.device, query.dtype, query.shape[1:], key_cache.dtype, key_cache.shape[1:])
    if kind not in _flashinfer:
        faster = flashinfer_attention.is_faster(query, key_cache, _attend_chunks)
        _flashinfer[kind] = faster
    return flashinfer_attention.attend_chunks if _flashinfer[kind] else _attend_chunks


def _attend_chunks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: RaggedBatch,
    chunks: list[int],
    output: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Our own kernel, with the signature of `flashinfer_attention.attend_chunks`."""
    plan = AttentionPlan.of(batch, query)
    chunk_attention(
        query,
        key_cache,
        value_cache,
        batch.block_tables,
        (plan.tile_sequences, plan.tile_offsets, plan.tile_size),
        plan.query_starts,
        plan.query_lens,
        plan.context_lens,
        output,
        scale,
        window,
    )


def _upload(columns: list[list[int] | tuple[int, ...]], device: torch.device) -> list[Tensor]:
    """Send lists of integers to the device in one copy, each aligned to 16 bytes.

    Alignment is part of what a kernel is compiled for: it must not depend on the batch.
    """
    flat: list[int] = []
    places = []
    for column in columns:
        places.append((len(flat), len(flat) + len(column)))
        flat.extend(column)
        flat.extend([0] * (triton.cdiv(len(flat), 4) * 4 - len(flat)))
    tensor = torch.tensor(flat, dtype=torch.int32).to(device, non_blocking=True)
    return [tensor[start:end] for start, end in places]
