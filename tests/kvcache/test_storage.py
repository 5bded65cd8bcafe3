"""KV tensors: slots through block tables, and packing between two storages of different tables."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from tandem.kvcache.storage import KVStorage, bytes_per_block


def make_storage(num_blocks: int = 6, dtype: torch.dtype = torch.float32) -> KVStorage:
    return KVStorage(
        num_layers=3,
        num_blocks=num_blocks,
        block_size=4,
        num_kv_heads=2,
        head_dim=5,
        dtype=dtype,
        device="cpu",
    )


def test_slots_follow_the_block_table() -> None:
    storage = make_storage()
    assert storage.slots([5, 2, 0], 3, 9).tolist() == [23, 8, 9, 10, 11, 0]
    assert storage.slots([5, 2, 0], 4, 4).tolist() == []
    assert storage.slots([5], 0, 1).dtype == torch.int64


def test_slots_past_the_table_are_refused() -> None:
    with pytest.raises(IndexError):
        make_storage().slots([5], 0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_arrives_at_the_other_table(dtype: torch.dtype) -> None:
    sender, receiver = make_storage(dtype=dtype), make_storage(num_blocks=9, dtype=dtype)
    sender.kv.copy_(torch.randn(sender.kv.shape))
    sent = sender.slots([1, 4, 0], 2, 10)
    received = receiver.slots([8, 3, 5], 2, 10)
    for first, count in ((0, 1), (1, 2)):
        staging = sender.pack(first, count, sent)
        assert staging.shape == (count, 2, 8, 2, 5)
        assert staging.is_contiguous()
        receiver.unpack(first, count, received, staging)
    for layer in range(3):
        for ours, theirs in zip(sender.layer(layer), receiver.layer(layer), strict=True):
            assert torch.equal(ours.flatten(0, 1)[sent], theirs.flatten(0, 1)[received])
    receiver.unpack(0, 3, received, torch.zeros(3, 2, 8, 2, 5, dtype=dtype))
    assert not receiver.kv.any()


def test_a_block_is_one_run_of_bytes() -> None:
    storage = make_storage()
    storage.unpack(0, 3, storage.slots([4], 0, 4), torch.ones(3, 2, 4, 2, 5))
    assert storage.blocks.flatten(1).sum(1).tolist() == [0, 0, 0, 0, 240, 0]
    assert storage.blocks[4].is_contiguous()
    assert not storage.memory[:, storage.blocks[0].numel() :].any()


def test_blocks_are_as_far_apart_as_is_said() -> None:
    storage = make_storage()
    apart = bytes_per_block(3, 4, 2, 5, torch.float32, torch.device("cpu"))
    assert storage.blocks[1].data_ptr() - storage.blocks[0].data_ptr() == apart
    assert storage.memory.nbytes == 6 * apart


def test_bytes_per_token_is_what_the_tensor_takes() -> None:
    for dtype in (torch.float32, torch.float16):
        storage = make_storage(dtype=dtype)
        assert storage.bytes_per_token * 6 * 4 == storage.kv.nbytes


def test_blocks_that_nobody_wrote_are_zero_and_take_no_memory() -> None:
    before = resident_bytes()
    storage = KVStorage(4, 2**16, 16, 4, 64, torch.bfloat16, "cpu")
    assert storage.kv.nbytes == 4 * 2**30
    assert not storage.kv[-1, -1, -1].any()
    assert resident_bytes() - before < 2**30
    storage.kv[-1, -1, -1].fill_(1)
    assert bool(storage.kv[-1, -1, -1].eq(1).all())


def resident_bytes() -> int:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
