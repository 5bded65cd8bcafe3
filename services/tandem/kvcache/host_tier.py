"""The second tier: KV blocks in host memory, and the copies between it and the device. Pure.

The tier is a block pool of its own, so that it has the same owners, the same prefix cache and the
same order of eviction as the device's. Three things are copied:

    swap     -- a preempted sequence, out; and back in when it is admitted again
    spill    -- cached blocks of the device, out, before they are evicted
    restore  -- a spilled prefix, back in, for a sequence that begins with it

Nobody waits for a spill: blocks are copied while they are still cached, so evicting one that has
been costs nothing, and one that has not is lost to the tier.

Invariants: while a copy is under way its blocks are held in both pools; a block is published here
only when all of it has arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tandem.core.config import CacheConfig
from tandem.kvcache.block_pool import BlockPool

CopyKind = Literal["swap_out", "swap_in", "spill", "restore"]

SPILL_BLOCKS = 32
"""Blocks of one spill. One is under way at a time: this bounds what spilling keeps from others."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockCopy:
    """Copy `device_blocks[i]` to `host_blocks[i]`, or the other way round."""

    number: int
    kind: CopyKind
    device_blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]

    @property
    def to_host(self) -> bool:
        return self.kind in ("swap_out", "spill")

    @property
    def holder(self) -> str:
        """The name under which it holds its blocks."""
        return _holder(self.number)


class HostTier:
    """The blocks in host memory of one worker. Copies are begun here, carried out elsewhere, and
    reported to `done`, always."""

    def __init__(self, device: BlockPool, num_blocks: int, spills: bool) -> None:
        self.device = device
        self.pool = BlockPool(num_blocks, device.block_size)
        self.spills = spills and device.prefix_cache
        """Whether the device's prefix cache spills; swapping needs no more than the room."""
        self.blocks_copied: dict[CopyKind, int] = dict.fromkeys(
            ("swap_out", "swap_in", "spill", "restore"), 0
        )
        self._begun: list[BlockCopy] = []
        self._under_way: dict[int, BlockCopy] = {}
        self._next_number = 1
        self._spillable: dict[int, None] = {}  # in the order in which they were cached
        self._spilling: dict[int, list[tuple[bytes, bytes]]] = {}
        if self.spills:
            device.prefixes.listeners.append(self)

    # ------------------------------------------------------------------ counts

    @property
    def num_under_way(self) -> int:
        """Copies begun and not reported yet."""
        return len(self._under_way)

    @property
    def num_coming_free(self) -> int:
        """Blocks of the device that copies under way will give back."""
        leaving = sum(
            self.device.num_held_by_transfers(copy.device_blocks)
            for copy in self._under_way.values()
            if copy.kind == "swap_out"
        )
        return leaving + self.device.prefixes.num_pinned

    def take_copies(self) -> list[BlockCopy]:
        """Return the copies begun since the last call: to be carried out in this order."""
        begun, self._begun = self._begun, []
        return begun

    # ------------------------------------------------------------------ swapping

    def can_swap_out(self, num_blocks: int) -> bool:
        """Whether there is room for a sequence of so many blocks, at the expense of prefixes."""
        return num_blocks > 0 and self.pool.can_allocate(num_blocks)

    def swap_out(self, blocks: Sequence[int], holder: str) -> BlockCopy:
        """Begin to copy blocks that `holder` still holds; its hold here is on the copies.

        The caller may release them on the device at once. Raises `OutOfBlocksError`.
        """
        copy = self._begin("swap_out", blocks, self.pool.allocate(len(blocks), holder))
        self.device.hold_for_transfer(blocks, copy.holder)
        self.pool.hold_for_transfer(copy.host_blocks, copy.holder)
        return copy

    def copy_in(
        self, kind: CopyKind, host_blocks: Sequence[int], device_blocks: Sequence[int]
    ) -> BlockCopy:
        """Begin to copy back into blocks that a request holds. The source is held by this copy, so
        that whoever held it here may let go at once."""
        copy = self._begin(kind, device_blocks, host_blocks)
        self.pool.share(host_blocks, copy.holder)
        self.device.hold_for_transfer(device_blocks, copy.holder)
        return copy

    # ------------------------------------------------------------------ prefixes

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks here of the longest run from the start of `hashes`."""
        return self.pool.match_prefix(hashes) if self.spills else []

    def spill(self) -> None:
        """Begin to copy cached blocks that are not here, once half of the device is in use.

        First those that were cached first: about the order in which they will be evicted.
        """
        if not self.spills or self._spilling or 2 * self.device.num_blank > self.device.num_blocks:
            return
        most = min(SPILL_BLOCKS, self.pool.num_free)
        blocks: list[int] = []
        while self._spillable and len(blocks) < most:
            block = next(iter(self._spillable))
            del self._spillable[block]
            if self._lacks(block):
                blocks.append(block)
        if not blocks:
            return
        names = [self.device.prefixes.name_of(block) for block in blocks]
        number = self._next_number
        copy = self._begin("spill", blocks, self.pool.allocate(len(blocks), _holder(number)))
        self._spilling[copy.number] = names
        self.device.prefixes.pin(blocks)

    def _lacks(self, block: int) -> bool:
        return self.device.prefixes.is_cached(block) and not self.pool.is_published(
            self.device.prefixes.name_of(block)[0]
        )

    # what the device's pool says (`CacheListener`)

    def cached(self, block: int) -> None:
        self._spillable.pop(block, None)
        self._spillable[block] = None

    def published(self, block_hash: bytes) -> None:
        return

    def evicted(self, block_hash: bytes) -> None:
        return

    # ------------------------------------------------------------------ the end of a copy

    def done(self, copy: BlockCopy, succeeded: bool = True) -> None:
        """Let go of a copy's blocks; what was spilled can be found from now on."""
        del self._under_way[copy.number]
        if succeeded:
            self.blocks_copied[copy.kind] += len(copy.host_blocks)
        if copy.kind == "spill":
            self._end_spill(copy, succeeded)
            return
        self.device.release_transfer(copy.device_blocks, copy.holder)
        if copy.to_host:
            self.pool.release_transfer(copy.host_blocks, copy.holder)
        else:
            self.pool.release(copy.host_blocks, copy.holder)

    def _end_spill(self, copy: BlockCopy, succeeded: bool) -> None:
        self.device.prefixes.unpin(copy.device_blocks)
        names = self._spilling.pop(copy.number)
        if succeeded:
            for block, (block_hash, parent) in zip(copy.host_blocks, names, strict=True):
                self.pool.publish(block, block_hash, parent)
        self.pool.release(copy.host_blocks, copy.holder)

    # ------------------------------------------------------------------ how it is done

    def _begin(
        self, kind: CopyKind, device_blocks: Iterable[int], host_blocks: Iterable[int]
    ) -> BlockCopy:
        number, self._next_number = self._next_number, self._next_number + 1
        copy = BlockCopy(number, kind, tuple(device_blocks), tuple(host_blocks))
        self._under_way[number] = copy
        self._begun.append(copy)
        return copy


def _holder(number: int) -> str:
    return f"copy:{number}"


def make_host_tier(
    cache: CacheConfig, pool: BlockPool, block_bytes: int, *, swaps: bool
) -> HostTier | None:
    """Return the host tier that the configuration asks for; None for none.

    `swaps`: whether sequences of this worker are preempted. Room for swapping is never more than
    the device's blocks: to swap out more at once is no use. No tier where the size of a block is
    not known, as in a simulation without links.
    """
    if not block_bytes:
        return None
    spilled = cache.host_memory_bytes // block_bytes if cache.prefix_cache else 0
    swapped = cache.swap_memory_bytes // block_bytes if swaps else 0
    num_blocks = max(spilled, min(swapped, pool.num_blocks))
    return HostTier(pool, num_blocks, spills=spilled > 0) if num_blocks else None
