"""Which blocks can be found by their prefix, and which of them go first. No tensors, no I/O.

A block is *published* with its hash and that of the block before it, its parent. While nobody holds
a published block it is *cached*, in a line in which the least recently used goes first. A cached
block that is being copied is *pinned*: it keeps its place in that line, but is passed over. Who
holds what is the block pool's business, which says when a block is kept here and taken back.

Invariant: a cached block is older than its cached parent, so that eviction never cuts off a suffix
that stays behind unfindable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from tandem.core.errors import IntegrityError


class CacheListener(Protocol):
    """Hears what becomes of the blocks that can be found by their prefix."""

    def published(self, block_hash: bytes) -> None:
        """A block can be found by this hash from now on."""

    def cached(self, block: int) -> None:
        """Nobody holds a published block any more: it may be evicted."""

    def evicted(self, block_hash: bytes) -> None:
        """The hash finds nothing any more."""


class PrefixCache:
    """The published blocks of one pool. Every operation costs O(1) per block of the chains that it
    names."""

    def __init__(self) -> None:
        self.listeners: list[CacheListener] = []
        self.num_evictions = 0
        """Cached blocks given to another owner since the start."""
        self.hash_of: dict[int, bytes] = {}
        """Of every published block. To be read only."""
        self._block_of: dict[bytes, int] = {}
        self._parent_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._pinned: set[int] = set()

    # ------------------------------------------------------------------ what is here

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for their prefix."""
        return len(self._cached)

    @property
    def num_pinned(self) -> int:
        """Cached blocks that cannot be evicted now."""
        if not self._pinned:
            return 0
        return sum(block in self._cached for block in self._pinned)

    @property
    def num_evictable(self) -> int:
        """Cached blocks that can be evicted now."""
        return len(self._cached) - (self.num_pinned if self._pinned else 0)

    def is_published(self, block_hash: bytes) -> bool:
        """Whether a hash finds a block. Does not count as a use of it."""
        return block_hash in self._block_of

    def is_cached(self, block: int) -> bool:
        """Whether nobody holds a block and it is kept for its prefix."""
        return block in self._cached

    def is_pinned(self, block: int) -> bool:
        """Whether a block must not be evicted, should it be cached."""
        return block in self._pinned

    def name_of(self, block: int) -> tuple[bytes, bytes]:
        """Return the hash of a published block and its parent's. Raises `KeyError`."""
        return self.hash_of[block], self._parent_of[block]

    def hashes(self) -> list[bytes]:
        """Return every hash that finds a block, those published first first."""
        return list(self._block_of)

    # ------------------------------------------------------------------ finding and keeping

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest published run from the start of `hashes`, and make them
        recently used."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        self._order_chains(blocks[-1:])
        return blocks

    def publish(self, block: int, block_hash: bytes, parent: bytes) -> None:
        """Make a held block findable, unless its hash finds another one already."""
        if block_hash in self._block_of:
            return
        if block in self.hash_of:
            raise IntegrityError(f"publish: block {block} is published with another hash")
        self.hash_of[block] = block_hash
        self._block_of[block_hash] = block
        self._parent_of[block] = parent
        for listener in self.listeners:
            listener.published(block_hash)

    def keep(self, blocks: Sequence[int]) -> None:
        """Take published blocks that nobody holds any more, the deepest of a chain first."""
        self._cached.update(dict.fromkeys(blocks))
        self._order_chains(blocks)
        for listener in self.listeners:
            for block in blocks:
                listener.cached(block)

    def take_back(self, blocks: Iterable[int]) -> None:
        """Blocks are held again, as far as they were not all the time. They stay published."""
        for block in blocks:
            self._cached.pop(block, None)

    def evict(self) -> int:
        """Return the block that is the first to go; it is not published any more."""
        block = next(block for block in self._cached if block not in self._pinned)
        del self._cached[block]
        block_hash = self.hash_of.pop(block)
        del self._block_of[block_hash]
        del self._parent_of[block]
        for listener in self.listeners:
            listener.evicted(block_hash)
        self.num_evictions += 1
        return block

    def pin(self, blocks: Iterable[int]) -> None:
        """Keep cached blocks from being evicted while they are copied, at their place in line.

        They can be found and shared meanwhile. Raises `IntegrityError`, and then nothing has
        changed.
        """
        blocks = list(blocks)
        for block in blocks:
            if block not in self._cached or block in self._pinned:
                raise IntegrityError(f"pin: block {block} is not cached, or pinned already")
        self._pinned.update(blocks)

    def unpin(self, blocks: Iterable[int]) -> None:
        """End what `pin` began."""
        blocks = set(blocks)
        if not blocks <= self._pinned:
            raise IntegrityError(f"unpin: {sorted(blocks - self._pinned)} are not pinned")
        self._pinned -= blocks

    def _order_chains(self, blocks: Iterable[int]) -> None:
        """Make `blocks` and their cached ancestors the most recent, each after its children.

        One walk serves all blocks of one chain.
        """
        seen: set[int] = set()
        for tip in blocks:
            block: int | None = None if tip in seen else tip
            while block is not None:
                seen.add(block)
                if block in self._cached:
                    self._cached.move_to_end(block)
                block = self._block_of.get(self._parent_of[block])

    # ------------------------------------------------------------------ integrity

    def violations(self, free: frozenset[int]) -> Iterable[str]:
        """Say what contradicts itself here, or that `free` blocks have nothing in them."""
        if {block: h for h, block in self._block_of.items()} != self.hash_of or len(
            self._block_of
        ) != len(self.hash_of):
            yield "the maps block -> hash and hash -> block disagree"
        if self._parent_of.keys() != self.hash_of.keys():
            yield "the parents of published blocks are not those of the hashed blocks"
        if lost := self._pinned & free:
            yield f"pinned blocks {sorted(lost)} are free"
        age = {block: position for position, block in enumerate(self._cached)}
        for block in self.hash_of:
            if block in free:
                yield f"free block {block} has a hash"
            parent = self._block_of.get(self._parent_of.get(block, b""))
            if block in age and parent in age and age[parent] < age[block]:
                yield f"cached block {block} is younger than its parent {parent}"
        for block in self._cached:
            if block not in self.hash_of:
                yield f"cached block {block} has no hash"
