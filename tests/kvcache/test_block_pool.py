"""The block pool: two kinds of owner, prefix cache, eviction order, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tandem.core.errors import IntegrityError
from tandem.kvcache.block_pool import BlockPool, OutOfBlocksError
from tandem.kvcache.hashing import chain_hashes


def publish_chain(pool: BlockPool, blocks: list[int], hashes: list[bytes]) -> None:
    parent = b""
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block, block_hash, parent)
        parent = block_hash


def cached_chain(pool: BlockPool, tokens: list[int], holder: str = "maker") -> list[bytes]:
    """Leave the chain of `tokens` in the cache, held by nobody."""
    hashes = chain_hashes(tokens, pool.block_size)
    blocks = pool.allocate(len(hashes), holder)
    publish_chain(pool, blocks, hashes)
    pool.release(blocks, holder)
    return hashes


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3, "a")
    assert len(set(blocks)) == 3
    assert (pool.num_used, pool.num_free) == (3, 1)
    assert not pool.can_allocate(2)
    with pytest.raises(OutOfBlocksError):
        pool.allocate(2, "b")
    assert pool.holders() == {"a": 3}
    pool.release(blocks, "a")
    assert (pool.num_used, pool.num_free, pool.holders()) == (0, 4, {})
    pool.check_integrity()


@pytest.mark.parametrize("request_first", [True, False])
def test_a_block_is_free_only_when_neither_kind_of_owner_holds_it(request_first: bool) -> None:
    pool = BlockPool(2, 2)
    blocks = pool.allocate(2, "r#0")
    pool.hold_for_transfer(blocks, "leg:1")
    let_go: list[Callable[[], None]] = [
        lambda: pool.release(blocks, "r#0"),
        lambda: pool.release_transfer(blocks, "leg:1"),
    ]
    first, second = let_go if request_first else reversed(let_go)
    first()
    assert pool.num_used == 2
    assert not pool.can_allocate(1)
    pool.check_integrity()
    second()
    assert pool.num_used == 0
    pool.check_integrity()


def test_a_holder_holds_a_block_once_per_kind() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2, "x")
    pool.hold_for_transfer(blocks, "x")
    assert pool.holders() == {"x": 4}
    refused: list[Callable[[], None]] = [
        lambda: pool.share(blocks, "x"),
        lambda: pool.share([blocks[0], blocks[0]], "y"),
        lambda: pool.hold_for_transfer(blocks[:1], "x"),
        lambda: pool.release(blocks, "y"),
        lambda: pool.release([blocks[0], blocks[0]], "x"),
        lambda: pool.release_transfer(blocks, "y"),
        lambda: pool.release([99], "x"),
        lambda: pool.share([-1], "x"),
    ]
    for operation in refused:
        with pytest.raises(IntegrityError):
            operation()
        assert pool.holders() == {"x": 4}
        pool.check_integrity()
    pool.release(blocks, "x")
    with pytest.raises(IntegrityError, match="does not hold"):
        pool.release(blocks, "x")


def test_a_free_block_cannot_be_shared_held_or_published() -> None:
    pool = BlockPool(2, 2)
    refused: list[Callable[[], None]] = [
        lambda: pool.share([0], "a"),
        lambda: pool.hold_for_transfer([0], "leg:1"),
        lambda: pool.publish(0, b"hash"),
    ]
    for operation in refused:
        with pytest.raises(IntegrityError):
            operation()


def test_a_cached_block_cannot_be_held_by_a_transfer_without_a_request() -> None:
    pool = BlockPool(2, 2)
    hashes = cached_chain(pool, [1, 2])
    with pytest.raises(IntegrityError, match="held by nobody"):
        pool.hold_for_transfer(pool.match_prefix(hashes), "leg:1")


def test_prefix_is_found_after_its_maker_is_gone_and_shared_while_held() -> None:
    pool = BlockPool(8, 2)
    hashes = cached_chain(pool, [1, 2, 3, 4, 5, 6])
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 3, 8)
    longer = chain_hashes([1, 2, 3, 4, 7, 8], 2)
    found = pool.match_prefix(longer)
    assert len(found) == 2
    assert pool.num_unheld(found) == 2
    pool.share(found, "a")
    pool.share(found, "b")
    assert (pool.num_used, pool.num_cached, pool.num_unheld(found)) == (2, 1, 0)
    pool.release(found, "a")
    assert pool.match_prefix(hashes)[:2] == found
    assert pool.num_used == 2
    pool.release(found, "b")
    assert (pool.num_used, pool.num_cached) == (0, 3)
    pool.check_integrity()


def test_first_published_block_of_a_hash_wins() -> None:
    pool = BlockPool(4, 2)
    hashes = chain_hashes([1, 2], 2)
    (first,), (second,) = pool.allocate(1, "a"), pool.allocate(1, "b")
    pool.publish(first, hashes[0])
    pool.publish(first, hashes[0])
    pool.publish(second, hashes[0])
    assert pool.match_prefix(hashes) == [first]
    pool.release([second], "b")
    assert pool.num_cached == 0
    pool.release([first], "a")
    assert pool.num_cached == 1
    pool.check_integrity()


def test_a_block_keeps_its_hash() -> None:
    pool = BlockPool(4, 2)
    (block,) = pool.allocate(1, "a")
    pool.publish(block, b"one")
    with pytest.raises(IntegrityError, match="another hash"):
        pool.publish(block, b"two")


def test_least_recently_used_chain_goes_first_and_deeper_blocks_before_their_parents() -> None:
    pool = BlockPool(6, 1)
    old = cached_chain(pool, [1, 2, 3])
    new = cached_chain(pool, [4, 5, 6])
    pool.match_prefix(old)  # used again: now `new` is the older one
    held = pool.allocate(2, "a")
    assert len(pool.match_prefix(new)) == 1
    assert len(pool.match_prefix(old)) == 3
    held += pool.allocate(2, "b")
    assert len(pool.match_prefix(new)) == 0
    assert len(pool.match_prefix(old)) == 2
    assert pool.prefixes.num_evictions == 4
    pool.check_integrity()


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4, 1)
    hashes = cached_chain(pool, [1, 2])
    pool.allocate(2, "a")
    assert len(pool.match_prefix(hashes)) == 2
    assert pool.prefixes.num_evictions == 0


def test_a_suffix_held_longer_by_a_transfer_is_still_evicted_before_its_parent() -> None:
    pool = BlockPool(4, 1)
    hashes = chain_hashes([1, 2, 3], 1)
    blocks = pool.allocate(3, "a")
    publish_chain(pool, blocks, hashes)
    pool.hold_for_transfer(blocks[2:], "leg:1")
    pool.release(blocks, "a")
    pool.release_transfer(blocks[2:], "leg:1")
    pool.check_integrity()
    pool.allocate(2, "b")
    assert pool.match_prefix(hashes) == blocks[:2]


def test_without_prefix_cache_nothing_is_kept() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    hashes = cached_chain(pool, [1, 2, 3, 4])
    assert pool.match_prefix(hashes) == []
    assert (pool.num_cached, pool.num_free) == (0, 4)
    pool.check_integrity()


def test_integrity_check_names_every_violation() -> None:
    pool = BlockPool(4, 1)
    cached_chain(pool, [1, 2])
    (held,) = pool.allocate(1, "a")
    pool._free.append(held)
    pool.prefixes._block_of.popitem()
    with pytest.raises(IntegrityError) as caught:
        pool.check_integrity()
    assert f"block {held}" in caught.value.message
    assert "maps" in caught.value.message
