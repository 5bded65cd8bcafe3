"""Attention over blocks equals plain attention over each sequence's own keys and values."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tandem_kernels import RaggedBatch, kv_write, paged_attention

HEAD_DIM = 8


def plain_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """One query [heads, head_dim] at the end of key and value [context, kv_heads, head_dim]."""
    if window is not None:
        key, value = key[-window:], value[-window:]
    group = query.shape[0] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("hd,chd->hc", query, key).double() * HEAD_DIM**-0.5
    return torch.einsum("hc,chd->hd", scores.softmax(-1), value.double()).float()


def check(
    chunks: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    block_size: int,
    window: int | None,
) -> None:
    """chunks: (start, length) of each sequence in the batch."""
    generator = torch.Generator().manual_seed(len(chunks))
    tables, num_blocks = [], 0
    for start, length in chunks:
        needed = -(-(start + length) // block_size)
        tables.append(list(range(num_blocks, num_blocks + needed)))
        num_blocks += needed
    order = list(range(num_blocks))
    random.Random(1).shuffle(order)
    tables = [[order[block] for block in table] for table in tables]

    # What lies in the cache where nothing was written is arbitrary, but finite.
    # A block's keys and values follow each other, as in a worker's KV.
    caches = torch.full((num_blocks, 2, block_size, kv_heads, HEAD_DIM), 1e4).transpose(0, 1)
    contexts = []
    for table, (start, length) in zip(tables, chunks, strict=True):
        shape = (2, start + length, kv_heads, HEAD_DIM)
        contexts.append(torch.randn(shape, generator=generator))
        if start:
            before = RaggedBatch.build([table], [0], [start], block_size)
            kv_write(*caches, before.slots, *contexts[-1][:, :start])
    starts, lengths = zip(*chunks, strict=True)
    batch = RaggedBatch.build(tables, starts, lengths, block_size)
    new = torch.cat(
        [context[:, start:] for context, start in zip(contexts, starts, strict=True)], 1
    )
    kv_write(*caches, batch.slots, *new)
    query = torch.randn((batch.num_tokens, heads, HEAD_DIM), generator=generator)

    output = paged_attention(query, *caches, batch, HEAD_DIM**-0.5, window)

    expected = [
        plain_attention(query[row + offset], *context[:, : start + offset + 1], window)
        for row, context, (start, length) in zip(batch.query_starts, contexts, chunks, strict=False)
        for offset in range(length)
    ]
    torch.testing.assert_close(output, torch.stack(expected), atol=1e-5, rtol=1e-4)


MIXED = [(0, 1), (0, 9), (5, 1), (40, 1), (13, 6), (200, 1), (199, 3), (3, 1)]


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_mixed_batch(heads: int, kv_heads: int, block_size: int, window: int | None) -> None:
    check(MIXED, heads=heads, kv_heads=kv_heads, block_size=block_size, window=window)


@pytest.mark.parametrize("window", [None, 40])
def test_long_contexts(window: int | None) -> None:
    """Longer than the tiles of any fast kernel, so that whole tiles are masked."""
    chunks = [(0, 1100), (1500, 1), (700, 600), (1100, 1), (1, 1)]
    check(chunks, heads=2, kv_heads=1, block_size=16, window=window)


def test_many_decode_rows() -> None:
    """More rows than one bucket takes."""
    chunks = [(length * 7 % 300, 1) for length in range(70)]
    check(chunks, heads=4, kv_heads=2, block_size=16, window=None)


def test_a_nan_stays_with_its_sequence() -> None:
    caches = torch.zeros((2, 8, 4, 1, HEAD_DIM))
    caches[:, 0] = float("nan")
    batch = RaggedBatch.build([[0], [1, 2, 3], [4]], [3, 9, 0], [1, 1, 1], 4)
    output = paged_attention(torch.ones((3, 1, HEAD_DIM)), *caches, batch, 1.0)
    assert output[0].isnan().all()
    assert output[1:].isfinite().all()
