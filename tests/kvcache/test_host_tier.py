"""The host tier, one promise at a time, and under whatever order of events."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.hashing import chain_hashes
from tandem.kvcache.host_tier import BlockCopy, HostTier

BLOCK = 4


def cached_chain(pool: BlockPool, tokens: list[int]) -> list[bytes]:
    """Let a finished sequence of these tokens leave its blocks in the prefix cache."""
    hashes = chain_hashes(tokens, BLOCK)
    blocks = pool.allocate(len(hashes), "seq")
    parent = b""
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block, block_hash, parent)
        parent = block_hash
    pool.release(blocks, "seq")
    return hashes


def carry_out(tier: HostTier) -> list[BlockCopy]:
    copies = tier.take_copies()
    for copy in copies:
        tier.done(copy)
    return copies


def test_a_prefix_is_found_in_host_memory_after_the_device_has_evicted_it() -> None:
    device = BlockPool(8, BLOCK)
    tier = HostTier(device, 8, spills=True)
    hashes = cached_chain(device, list(range(24)))
    tier.spill()
    assert tier.match_prefix(hashes) == [], "what has not arrived was found"
    carry_out(tier)
    blocks = device.allocate(8, "other")
    assert device.match_prefix(hashes) == []
    found = tier.match_prefix(hashes)
    assert len(found) == 6
    copy = tier.copy_in("restore", found, blocks[:6])
    assert tier.pool.num_used == 6, "the source of a copy may not be evicted"
    tier.done(copy)
    assert (tier.pool.num_used, tier.pool.num_cached) == (0, 6)


def test_nothing_is_spilled_while_most_of_the_device_is_blank() -> None:
    device = BlockPool(64, BLOCK)
    tier = HostTier(device, 8, spills=True)
    cached_chain(device, list(range(24)))
    tier.spill()
    assert tier.take_copies() == []


def test_a_block_that_is_copied_is_not_evicted_and_can_still_be_found() -> None:
    device = BlockPool(4, BLOCK)
    tier = HostTier(device, 4, spills=True)
    hashes = cached_chain(device, list(range(16)))
    tier.spill()
    (copy,) = tier.take_copies()
    assert not device.can_allocate(1)
    assert tier.num_coming_free == 4
    shared = device.match_prefix(hashes)
    assert len(shared) == 4
    device.share(shared, "reader")
    tier.done(copy)
    device.release(shared, "reader")
    assert device.num_free == 4
    device.check_integrity()


def test_swapped_blocks_are_the_devices_again_only_when_the_copy_has_ended() -> None:
    device = BlockPool(4, BLOCK)
    tier = HostTier(device, 4, spills=False)
    blocks = device.allocate(3, "seq")
    copy = tier.swap_out(blocks, "seq")
    device.release(blocks, "seq")
    assert (device.num_free, tier.num_coming_free) == (1, 3)
    tier.done(copy)
    assert (device.num_free, tier.num_coming_free) == (4, 0)
    assert tier.pool.num_used == 3, "the sequence's KV is kept"
    tier.pool.release(copy.host_blocks, "seq")
    assert tier.pool.num_used == 0


def test_a_sequence_that_ends_during_its_copy_leaves_nothing_behind() -> None:
    device = BlockPool(4, BLOCK)
    tier = HostTier(device, 4, spills=False)
    blocks = device.allocate(3, "seq")
    copy = tier.swap_out(blocks, "seq")
    device.release(blocks, "seq")
    tier.pool.release(copy.host_blocks, "seq")
    assert tier.pool.num_used == 3, "the copy still writes"
    tier.done(copy, succeeded=False)
    assert (device.num_free, tier.pool.num_free) == (4, 4)


def test_the_least_recently_used_prefix_goes_first_and_swapping_comes_before_prefixes() -> None:
    device = BlockPool(4, BLOCK)
    tier = HostTier(device, 6, spills=True)
    chains = []
    for family in range(3):
        chains.append(cached_chain(device, list(range(100 * family, 100 * family + 12))))
        tier.spill()
        carry_out(tier)
    assert [len(tier.match_prefix(chain)) for chain in chains] == [0, 3, 3]
    tier.match_prefix(chains[1])
    blocks = device.allocate(4, "seq")
    tier.done(tier.swap_out(blocks, "seq"))
    assert len(tier.match_prefix(chains[2])) < 3
    tier.pool.check_integrity()


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["cache", "swap", "restore", "done", "fail", "end", "spill", "fill"]),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(EVENTS, st.integers(4, 16), st.integers(0, 16), st.booleans())
@settings(max_examples=300)
def test_whatever_happens_in_whatever_order_no_block_leaks(
    events: list[tuple[str, int]], on_device: int, in_host: int, spills: bool
) -> None:
    device = BlockPool(on_device, BLOCK)
    tier = HostTier(device, in_host, spills)
    under_way: list[BlockCopy] = []
    swapped: dict[str, tuple[int, ...]] = {}
    holding: dict[str, list[int]] = {}
    names = iter(f"s{i}" for i in range(1000))
    for event, number in events:
        tokens = list(range(100 * number, 100 * number + 4 * (1 + number)))
        match event:
            case "cache":
                known = device.match_prefix(chain_hashes(tokens, BLOCK))
                if not known and device.can_allocate(1 + number):
                    cached_chain(device, tokens)
            case "swap" if device.can_allocate(2) and tier.can_swap_out(2):
                name, blocks = next(names), device.allocate(2, "x")
                copy = tier.swap_out(blocks, name)
                device.release(blocks, "x")
                swapped[name] = copy.host_blocks
            case "restore":
                found = tier.match_prefix(chain_hashes(tokens, BLOCK))
                if found and device.can_allocate(len(found)):
                    name = next(names)
                    holding[name] = device.allocate(len(found), name)
                    tier.copy_in("restore", found, holding[name])
            case "end" if swapped:
                name, host_blocks = swapped.popitem()
                tier.pool.release(host_blocks, name)
            case "end" if holding:
                name, blocks = holding.popitem()
                device.release(blocks, name)
            case "done" | "fail" if under_way:
                tier.done(under_way.pop(0), succeeded=event == "done")
            case "spill":
                tier.spill()
            case "fill" if device.can_allocate(1):
                name = next(names)
                holding[name] = device.allocate(1, name)
        under_way += tier.take_copies()
        device.check_integrity()
        tier.pool.check_integrity()
        for copy in under_way:
            assert not set(copy.device_blocks) & set(device._free), "a block under a copy is free"
    for copy in under_way:
        tier.done(copy)
    for name, host_blocks in swapped.items():
        tier.pool.release(host_blocks, name)
    for name, blocks in holding.items():
        device.release(blocks, name)
    assert (device.num_used, tier.pool.num_used, tier.num_under_way) == (0, 0, 0)
