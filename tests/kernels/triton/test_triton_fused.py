"""What only the Triton kernels do in one step equals the steps of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem_kernels import triton as kernels
from tandem_kernels.implementation import REFERENCE
from tandem_kernels.ragged_batch import RaggedBatch
from tandem_kernels.triton.decode_attention import num_splits
from tandem_kernels.triton.static_batch import StaticDecodeBatch


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (14, 2, 20), (9, 9, 2)])
def test_rotary_and_kv_write(heads: int, kv_heads: int, head_dim: int) -> None:
    """On strided views, as the engine calls it; a negative slot writes nothing."""
    tokens = 5
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim)
    cos, sin = torch.randn(2, tokens, 1, head_dim // 2)
    slots = torch.tensor([3, 11, 0, 7, 8])
    expected = torch.zeros(2, 3, 4, kv_heads, head_dim)
    caches = torch.zeros(3, 2, 4, kv_heads, head_dim).transpose(0, 1)  # block by block
    parts = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
    query = REFERENCE.rotary_kv_write(*parts, cos, sin, *expected, slots)
    torch.testing.assert_close(
        kernels.rotary_kv_write(*parts, cos, sin, *caches, slots), query, atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(caches, expected, atol=1e-6, rtol=1e-5)
    caches.zero_()
    slots[1:] = -1
    kernels.rotary_kv_write(*parts, cos, sin, *caches, slots)
    assert caches.flatten(1, 2).any(-1).any(-1).nonzero().tolist() == [[0, 3], [1, 3]]


def test_head_slices_of_two_ranks_make_whole_slots() -> None:
    """KV of one rank with all heads goes to two ranks with half of them each, and back."""
    whole, again = (
        blocks.permute(1, 2, 0, 3, 4, 5)  # as a worker keeps them, block by block
        for blocks in (torch.randn(4, 3, 2, 4, 4, 8), torch.zeros(4, 3, 2, 4, 4, 8))
    )
    slots = torch.tensor([2, 9, 15, 0])
    for first in (0, 2):
        half = torch.zeros(3, 2, 4, 4, 2, 8)
        packed = kernels.kv_pack(whole, 1, 2, slots, first_head=first, num_heads=2)
        assert torch.equal(packed, whole.flatten(2, 3)[1:, :, slots, first : first + 2])
        kernels.kv_unpack(half, 1, 2, slots, packed)
        back = kernels.kv_pack(half, 1, 2, slots)
        kernels.kv_unpack(again, 1, 2, slots, back, first_head=first)
    flat = again.flatten(2, 3)
    assert torch.equal(flat[1:, :, slots], whole.flatten(2, 3)[1:, :, slots])
    flat[1:, :, slots] = 0
    assert not flat.any()


def rules(rows: int, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), min_p),
    )


@pytest.mark.parametrize("limits", [None, (3, 1.0, 0.0), (0, 0.7, 0.0), (20, 0.9, 0.05)])
def test_drawn_tokens_equal_the_reference(limits: tuple[int, float, float] | None) -> None:
    rows, vocab = 6, 1500  # more than one part of the vocabulary
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn((rows, vocab), generator=generator) * 3
    logits[1] = float("-inf")
    logits[1, 1200] = -7.0
    logits[2] = logits[2] * 1e30
    temperatures = torch.tensor([1e-6, 1.0, 0.5, 0.9, 2.0, 1.0])
    seeds, positions = torch.arange(rows) - 3, torch.arange(rows) * 1000
    arguments = (logits, temperatures, seeds, positions, *(rules(rows, *limits) if limits else ()))
    before = logits.clone()
    drawn = kernels.sample_tokens(*arguments)
    assert torch.equal(logits, before)
    assert drawn.tolist() == REFERENCE.sample_tokens(*arguments).tolist()
    assert drawn[1] == 1200


def test_a_row_of_forbidden_tokens_gives_a_token_that_exists() -> None:
    logits, one = torch.full((1, 3000), float("-inf")), torch.ones(1, dtype=torch.int64)
    assert kernels.sample_tokens(logits, one.float(), one, one).tolist() == [0]


def test_splits_fill_the_device_and_are_never_needlessly_short() -> None:
    device = torch.device("cpu")
    assert num_splits(1, 1, 10_000, device) > 1
    assert num_splits(1, 1, 10, device) == 1
    assert num_splits(64, 8, 10_000, device) == 1


def test_a_static_batch_lays_out_rows_and_padding() -> None:
    batch = StaticDecodeBatch(4, 20, 4, torch.device("cpu"))
    first = RaggedBatch.build([[3, 9, 2], [6]], [5, 0], [1, 1], 4, torch.device("cpu"))
    batch.fill(torch.tensor([7, 8]), first)
    ragged = batch.ragged(4)
    assert batch.token_ids(4).tolist() == [7, 8, 0, 0]
    assert ragged.positions.tolist() == [5, 0, 0, 0]
    assert ragged.slots.tolist() == [9 * 4 + 1, 6 * 4, -1, -1]
    assert ragged.block_tables[:2, :2].tolist() == [[3, 9], [6, 6]]
    assert kernels.AttentionPlan.of(ragged, torch.empty(0)).context_lens.tolist() == [6, 1, 0, 0]
    then = RaggedBatch.build([[0, 1, 2, 3, 4]], [19], [1], 4, torch.device("cpu"))
    batch.fill(torch.tensor([1]), then)
    assert ragged.slots.tolist() == [19, -1, -1, -1]  # the same memory
