"""Who owns which KV block, and which blocks can be found by their prefix. No tensors, no I/O.

Every block is in exactly one of three places:

    free    -- nobody holds it, nothing worth keeping is in it
    used    -- a request holds it, or a transfer that reads or writes it, or both
    cached  -- nobody holds it, but its prefix is published; the least recently used goes first

A cached block that is being copied is *pinned*: it keeps its place in that line, but is passed
over.

Invariant: a block leaves `used` only when neither kind of owner holds it. So a cancelled request
never frees a block that is still under a write.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from tandem.core.errors import IntegrityError, TandemError

Owner = Literal["request", "transfer"]


class CacheListener(Protocol):
    """Hears what becomes of the blocks that can be found by their prefix."""

    def published(self, block_hash: bytes) -> None:
        """A block can be found by this hash from now on."""

    def cached(self, block: int) -> None:
        """Nobody holds a published block any more: it may be evicted."""

    def evicted(self, block_hash: bytes) -> None:
        """The hash finds nothing any more."""


class OutOfBlocksError(TandemError):
    """More blocks were asked for than can be obtained now."""


class BlockPool:
    """The blocks of one worker. Every operation costs O(1) per block that it names.

    A holder is a name; it may hold a block once per kind of owner. Whatever breaks this raises
    `IntegrityError` and changes nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.num_evictions = 0
        """Cached blocks given to another owner since the start."""
        self._free: list[int] = []
        """Free blocks that were used before; the last one is taken first."""
        self._num_touched = 0
        """Blocks from here on are free and were never used: a large pool costs what is used."""
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._holders: dict[Owner, dict[int, frozenset[str]]] = {"request": {}, "transfer": {}}
        """By block, where there are any; one set for all blocks that were allocated together."""
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._parent_of: dict[int, bytes] = {}
        self._pinned: set[int] = set()
        self.listeners: list[CacheListener] = []

    # ------------------------------------------------------------------ counts

    @property
    def num_free(self) -> int:
        """Blocks obtainable now: free ones and cached ones."""
        blank = self.num_blocks - self._num_touched + len(self._free)  # `num_blank`, written out
        return blank + len(self._cached) - (self.num_pinned if self._pinned else 0)

    @property
    def num_pinned(self) -> int:
        """Cached blocks that cannot be evicted now."""
        if not self._pinned:
            return 0
        return sum(block in self._cached for block in self._pinned)

    @property
    def num_touched(self) -> int:
        """Blocks that were ever used: those with a lower number."""
        return self._num_touched

    @property
    def num_blank(self) -> int:
        """Blocks with nothing in them that is worth keeping."""
        return self.num_blocks - self._num_touched + len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that a request or a transfer holds, pinned ones included."""
        used = self._num_touched - len(self._free) - len(self._cached)
        return used + self.num_pinned if self._pinned else used

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for their prefix."""
        return len(self._cached)

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as obtainable as long as nobody shares them."""
        return sum(not (self._is_held(block) or block in self._pinned) for block in blocks)

    def num_held_by_transfers(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` transfers hold and no request."""
        requests, transfers = self._holders["request"], self._holders["transfer"]
        return sum(block in transfers and block not in requests for block in blocks)

    def can_allocate(self, n: int) -> bool:
        """Whether `allocate(n, ...)` would succeed."""
        return n <= self.num_free

    # ------------------------------------------------------------------ holds of requests

    def allocate(self, n: int, holder: str) -> list[int]:
        """Give `holder` the request hold of `n` blocks that nobody held, evicting cached ones.

        Raises `OutOfBlocksError`, and then nothing has changed.
        """
        if n > len(self._free) and not self.can_allocate(n):
            raise OutOfBlocksError(f"{holder} asked for {n} blocks, {self.num_free} are obtainable")
        blocks = self._free[: -n - 1 : -1]  # as `_take`, so often, from the end
        del self._free[len(self._free) - len(blocks) :]
        if len(blocks) < n:
            blocks += [self._take() for _ in range(n - len(blocks))]
        self._holders["request"].update(dict.fromkeys(blocks, frozenset((holder,))))
        return blocks

    def share(self, blocks: Sequence[int], holder: str) -> None:
        """Add a request hold on blocks that are held already or cached: a prefix hit."""
        self._hold("request", blocks, holder)

    def release(self, blocks: Sequence[int], holder: str) -> None:
        """Give back the request holds of `holder`. `blocks` in the order of the block table."""
        self._release("request", blocks, holder)

    # ------------------------------------------------------------------ holds of transfers

    def hold_for_transfer(self, blocks: Sequence[int], holder: str) -> None:
        """Keep blocks that are held already while a transfer reads or writes them."""
        for block in blocks:
            self._check_known(block)
            if not self._is_held(block):
                raise IntegrityError(f"transfer {holder}: block {block} is held by nobody")
        self._hold("transfer", blocks, holder)

    def release_transfer(self, blocks: Sequence[int], holder: str) -> None:
        """Give back the transfer holds of `holder`. `blocks` in the order of the block table."""
        self._release("transfer", blocks, holder)

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

    # ------------------------------------------------------------------ prefix cache

    def is_published(self, block_hash: bytes) -> bool:
        """Whether a hash finds a block. Does not count as a use of it."""
        return block_hash in self._block_of

    def is_cached(self, block: int) -> bool:
        """Whether nobody holds a block and it is kept for its prefix."""
        return block in self._cached

    def published_name(self, block: int) -> tuple[bytes, bytes]:
        """Return the hash of a published block and its parent's. Raises `KeyError`."""
        return self._hash_of[block], self._parent_of[block]

    def published_hashes(self) -> list[bytes]:
        """Return every hash that finds a block, those published first first."""
        return list(self._block_of)

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest published run from the start of `hashes`, which may
        begin in the middle of a chain.

        Takes no hold: `share` them before anything else is allocated. Makes them recently used.
        """
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        self._order_chains(blocks[-1:])
        return blocks

    def publish(self, block: int, block_hash: bytes, parent: bytes = b"") -> None:
        """Make a full, computed, held block findable; `parent` is the hash of the block before it.

        The first block of a hash wins: publishing another one with it changes nothing.
        """
        self._check_known(block)
        if not self._is_held(block):
            raise IntegrityError(f"publish: block {block} is held by nobody")
        if not self.prefix_cache or self._block_of.get(block_hash) is not None:
            return
        if block in self._hash_of:
            raise IntegrityError(f"publish: block {block} is published with another hash")
        self._hash_of[block] = block_hash
        self._block_of[block_hash] = block
        self._parent_of[block] = parent
        for listener in self.listeners:
            listener.published(block_hash)

    # ------------------------------------------------------------------ reports

    def holders(self) -> dict[str, int]:
        """Who holds how many blocks, both kinds together. O(num_blocks): for leak reports."""
        counts: Counter[str] = Counter()
        for per_block in self._holders.values():
            for names in per_block.values():
                counts.update(names)
        return dict(counts)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` naming every violation of the pool's invariants."""
        problems = [*self._place_violations(), *self._hash_violations()]
        if problems:
            raise IntegrityError("block pool: " + "; ".join(problems))

    # ------------------------------------------------------------------ how it is done

    def _is_held(self, block: int) -> bool:
        return block in self._holders["request"] or block in self._holders["transfer"]

    def _check_known(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise IntegrityError(f"block {block} is outside [0, {self.num_blocks})")

    def _hold(self, owner: Owner, blocks: Sequence[int], holder: str) -> None:
        names = self._holders[owner]
        for block in blocks:
            self._check_known(block)
            if holder in names.get(block, ()):
                raise IntegrityError(f"{owner} {holder} already holds block {block}")
            if not self._is_held(block) and block not in self._cached:
                raise IntegrityError(f"{owner} {holder}: block {block} is free")
        _refuse_repeats(blocks, f"{owner} {holder}")
        for block in blocks:
            self._cached.pop(block, None)
            names[block] = names.get(block, frozenset()) | {holder}

    def _release(self, owner: Owner, blocks: Sequence[int], holder: str) -> None:
        names = self._holders[owner]
        others = self._holders["transfer" if owner == "request" else "request"]
        is_plain = not (others or self._hash_of)  # nothing is published or in flight
        if not (is_plain and set(map(names.get, blocks)) == {frozenset((holder,))}):
            is_plain = False
            for block in blocks:
                if holder not in names.get(block, ()):
                    self._check_known(block)
                    raise IntegrityError(f"{owner} {holder} does not hold block {block}")
        _refuse_repeats(blocks, f"{owner} {holder}")
        if is_plain:  # nor shared: all at once
            for block in blocks:
                del names[block]
            self._free.extend(reversed(blocks))
            return
        newly_cached: list[int] = []
        for block in reversed(blocks):
            left = names.pop(block)
            if len(left) > 1:
                names[block] = left - {holder}
            elif block in others:
                continue
            elif block in self._hash_of:
                self._cached[block] = None
                newly_cached.append(block)
            else:
                self._free.append(block)
        self._order_chains(newly_cached)
        for listener in self.listeners:
            for block in newly_cached:
                listener.cached(block)

    def _order_chains(self, blocks: Iterable[int]) -> None:
        """Make `blocks` and their cached ancestors the most recent, each after its children.

        Invariant: a cached block is older than its cached parent, so that eviction never cuts off
        a suffix that stays behind unfindable. One walk serves all blocks of one chain.
        """
        seen: set[int] = set()
        for tip in blocks:
            block: int | None = None if tip in seen else tip
            while block is not None:
                seen.add(block)
                if block in self._cached:
                    self._cached.move_to_end(block)
                block = self._block_of.get(self._parent_of[block])

    def _take(self) -> int:
        """A block that nobody holds: one used before, one never used, or the oldest cached one."""
        if self._free:
            return self._free.pop()
        if self._num_touched < self.num_blocks:
            self._num_touched += 1
            return self._num_touched - 1
        return self._evict()

    def _evict(self) -> int:
        block = next(block for block in self._cached if block not in self._pinned)
        del self._cached[block]
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        del self._parent_of[block]
        for listener in self.listeners:
            listener.evicted(block_hash)
        self.num_evictions += 1
        return block

    def _place_violations(self) -> Iterable[str]:
        untouched = range(self._num_touched, self.num_blocks)
        free = {*self._free, *untouched}
        if len(free) != len(self._free) + len(untouched):
            yield "a block is in the free list twice"
        for block in range(self.num_blocks):
            places = (block in free, block in self._cached, self._is_held(block))
            if sum(places) != 1:
                yield f"block {block}: (free, cached, held) = {places}"
        if lost := self._pinned & free:
            yield f"pinned blocks {sorted(lost)} are free"
        strangers = (free | set(self._cached)) - set(range(self.num_blocks))
        if strangers:
            yield f"unknown blocks {sorted(strangers)}"

    def _hash_violations(self) -> Iterable[str]:
        if {block: h for h, block in self._block_of.items()} != self._hash_of or len(
            self._block_of
        ) != len(self._hash_of):
            yield "the maps block -> hash and hash -> block disagree"
        if self._parent_of.keys() != self._hash_of.keys():
            yield "the parents of published blocks are not those of the hashed blocks"
        free = set(self._free)
        age = {block: position for position, block in enumerate(self._cached)}
        for block in self._hash_of:
            if block in free:
                yield f"free block {block} has a hash"
            parent = self._block_of.get(self._parent_of.get(block, b""))
            if block in age and parent in age and age[parent] < age[block]:
                yield f"cached block {block} is younger than its parent {parent}"
        for block in self._cached:
            if block not in self._hash_of:
                yield f"cached block {block} has no hash"


def _refuse_repeats(blocks: Sequence[int], who: str) -> None:
    if len(set(blocks)) != len(blocks):
        raise IntegrityError(f"{who}: a block is named twice in {list(blocks)}")
