"""Pages of KV blocks are there before the blocks are written, and no further ahead than needed."""

from __future__ import annotations

import queue
import resource
from collections.abc import Iterator

import pytest
import torch

from tandem.kvcache.storage import KVStorage
from tandem.worker.page_maker import PageMaker

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM = 2, 512, 16, 4, 64
BLOCK_BYTES = LAYERS * 2 * BLOCK_SIZE * HEADS * HEAD_DIM * 4


def make_storage(num_blocks: int = BLOCKS) -> KVStorage:
    return KVStorage(LAYERS, num_blocks, BLOCK_SIZE, HEADS, HEAD_DIM, torch.float32, "cpu")


def faults_of_writing(storage: KVStorage, first: int, end: int) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    storage.kv[:, :, first:end] = 1.0
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_blocks_whose_pages_are_made_are_written_without_a_fault() -> None:
    storage = make_storage()
    if not storage.make_pages(0, 256):
        pytest.skip("this kernel cannot make pages ahead")
    pages = 256 * BLOCK_BYTES // resource.getpagesize()
    assert faults_of_writing(storage, 0, 256) < pages / 100
    assert faults_of_writing(storage, 256, 512) > pages / 100


def test_making_pages_changes_nothing_in_them() -> None:
    storage = make_storage()
    storage.kv[:, :, 3] = 7.0
    storage.make_pages(0, BLOCKS)
    assert torch.equal(storage.kv[:, :, 3], torch.full_like(storage.kv[:, :, 3], 7.0))
    assert not storage.kv[:, :, 4:].any()


class Noted(KVStorage):
    """Says which pages are asked for."""

    def __init__(self, num_blocks: int, *, can: bool = True) -> None:
        super().__init__(LAYERS, num_blocks, BLOCK_SIZE, HEADS, HEAD_DIM, torch.float32, "cpu")
        self.asked: queue.Queue[tuple[int, int]] = queue.Queue()
        self._can = can

    def make_pages(self, first: int, end: int) -> bool:
        self.asked.put((first, end))
        return self._can

    def asked_until(self, block: int) -> Iterator[tuple[int, int]]:
        end = 0
        while end < block:
            first, end = self.asked.get(timeout=30)
            yield first, end


def test_pages_are_made_in_order_and_so_far_ahead_of_what_is_used() -> None:
    ahead = (128 << 20) // BLOCK_BYTES
    storage = Noted(10 * ahead)
    maker = PageMaker("w", storage)
    try:
        steps = list(storage.asked_until(ahead))
        maker.used(1)  # one block more is not worth waking a thread
        maker.used(2 * ahead)
        steps += storage.asked_until(3 * ahead)
    finally:
        maker.stop()
    assert steps[0][0] == 0
    assert [first for first, _ in steps[1:]] == [end for _, end in steps[:-1]]
    assert steps[-1][1] == 3 * ahead
    assert storage.asked.empty()


def test_no_more_pages_than_there_are_blocks() -> None:
    storage = Noted(8)
    maker = PageMaker("w", storage)
    maker.used(8)
    assert list(storage.asked_until(8)) == [(0, 8)]
    maker.stop()


def test_a_kernel_that_cannot_is_asked_once() -> None:
    storage = Noted(BLOCKS, can=False)
    maker = PageMaker("w", storage)
    storage.asked.get(timeout=30)
    maker.used(BLOCKS)
    with pytest.raises(queue.Empty):
        storage.asked.get(timeout=0.2)
