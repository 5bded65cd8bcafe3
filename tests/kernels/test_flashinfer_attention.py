"""FlashInfer's view of a batch names exactly its tokens, and where it runs its results are ours."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tandem_kernels import REFERENCE, RaggedBatch
from tandem_kernels.flashinfer_attention import attend_chunks, is_candidate, paged_layout

TABLES = [[7, 2, 9], [4], [1, 8, 3, 5], [6, 0]]
STARTS, LENGTHS = [3, 2, 0, 5], [8, 1, 14, 3]


def test_the_layout_names_the_tokens_of_the_chunks() -> None:
    batch = RaggedBatch.build(TABLES, STARTS, LENGTHS, block_size=4)
    layout = paged_layout(batch, [0, 2, 3])
    assert layout.rows.tolist() == [*range(8), *range(9, 26)]
    assert layout.query_starts.tolist() == [0, 8, 22, 25]
    assert layout.block_starts.tolist() == [0, 3, 7, 9]
    assert layout.blocks.tolist() == [7, 2, 9, 1, 8, 3, 5, 6, 0]
    assert layout.last_block_lens.tolist() == [3, 2, 4]
    assert layout.blocks.dtype == layout.query_starts.dtype == torch.int32


def test_queries_that_it_does_not_know_stay_with_us() -> None:
    assert not is_candidate(torch.zeros(3, 4, 64))


@pytest.mark.gpu
@pytest.mark.skipif(
    find_spec("flashinfer") is None or not torch.cuda.is_available(),
    reason="needs FlashInfer and a CUDA device",
)
@pytest.mark.parametrize("window", [None, 5])
def test_chunks_equal_the_reference(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    caches = torch.randn((2, 10, 4, 2, 64), generator=generator)
    query = torch.randn((26, 8, 64), generator=generator)
    batch = RaggedBatch.build(TABLES, STARTS, LENGTHS, block_size=4)
    expected = REFERENCE.paged_attention(query, *caches, batch, 0.125, window)
    on_gpu = RaggedBatch.build(TABLES, STARTS, LENGTHS, block_size=4, device="cuda")
    half = torch.bfloat16
    output = torch.zeros_like(query, dtype=half, device="cuda")
    attend_chunks(
        query.to("cuda", half), *caches.to("cuda", half), on_gpu, [0, 2, 3], output, 0.125, window
    )
    rows = paged_layout(batch, [0, 2, 3]).rows
    torch.testing.assert_close(output.float().cpu()[rows], expected[rows], atol=2e-2, rtol=2e-2)
    assert not output[8].any(), "a decode row was written"
