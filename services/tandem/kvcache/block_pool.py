"""Who owns which KV block. No tensors, no I/O.

Every block is in exactly one of three places:

    free    -- nobody holds it, nothing worth keeping is in it
    used    -- a request holds it, or a transfer that reads or writes it, or both
    cached  -- nobody holds it, but its prefix is published (`prefix_cache`)

Invariant: a block leaves `used` only when neither kind of owner holds it. So a cancelled request
never frees a block that is still under a write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from tandem.core.errors import IntegrityError, TandemError
from tandem.kvcache.prefix_cache import PrefixCache

Owner = Literal["request", "transfer"]


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
        self._free: list[int] = []
        """Free blocks that were used before; the last one is taken first."""
        self._num_touched = 0
        """Blocks from here on are free and were never used: a large pool costs what is used."""
        self._holders: dict[Owner, dict[int, frozenset[str]]] = {"request": {}, "transfer": {}}
        """By block, where there are any; one set for all blocks that were allocated together."""
        self.prefixes = PrefixCache()
        """Without a prefix cache nothing is ever published."""

    # ------------------------------------------------------------------ counts

    @property
    def num_free(self) -> int:
        """Blocks obtainable now: free ones and cached ones."""
        blank = self.num_blocks - self._num_touched + len(self._free)  # `num_blank`, written out
        return blank + self.prefixes.num_evictable

    @property
    def num_blank(self) -> int:
        """Blocks with nothing in them that is worth keeping."""
        return self.num_blocks - self._num_touched + len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that a request or a transfer holds, pinned ones included."""
        return self._num_touched - len(self._free) - self.prefixes.num_evictable

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for their prefix."""
        return self.prefixes.num_cached

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as obtainable as long as nobody shares them."""
        is_pinned = self.prefixes.is_pinned
        return sum(not (self._is_held(block) or is_pinned(block)) for block in blocks)

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
            self._check_held(block, f"transfer {holder}")
        self._hold("transfer", blocks, holder)

    def release_transfer(self, blocks: Sequence[int], holder: str) -> None:
        """Give back the transfer holds of `holder`. `blocks` in the order of the block table."""
        self._release("transfer", blocks, holder)

    # ------------------------------------------------------------------ prefix cache

    def is_published(self, block_hash: bytes) -> bool:
        """Whether a hash finds a block. Does not count as a use of it."""
        return self.prefixes.is_published(block_hash)

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest published run from the start of `hashes`, which may
        begin in the middle of a chain.

        Takes no hold: `share` them before anything else is allocated. Makes them recently used.
        """
        return self.prefixes.match(hashes)

    def publish(self, block: int, block_hash: bytes, parent: bytes = b"") -> None:
        """Make a full, computed, held block findable; `parent` is the hash of the block before it.

        The first block of a hash wins: publishing another one with it changes nothing.
        """
        self._check_held(block, "publish")
        if self.prefix_cache:
            self.prefixes.publish(block, block_hash, parent)

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
        problems = self._violations()
        if problems:
            raise IntegrityError("block pool: " + "; ".join(problems))

    # ------------------------------------------------------------------ how it is done

    def _is_held(self, block: int) -> bool:
        return block in self._holders["request"] or block in self._holders["transfer"]

    def _check_known(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise IntegrityError(f"block {block} is outside [0, {self.num_blocks})")

    def _check_held(self, block: int, who: str) -> None:
        if not self._is_held(block):
            self._check_known(block)
            raise IntegrityError(f"{who}: block {block} is held by nobody")

    def _hold(self, owner: Owner, blocks: Sequence[int], holder: str) -> None:
        names = self._holders[owner]
        for block in blocks:
            if holder in names.get(block, ()):
                raise IntegrityError(f"{owner} {holder} already holds block {block}")
            if not self._is_held(block) and not self.prefixes.is_cached(block):
                self._check_known(block)
                raise IntegrityError(f"{owner} {holder}: block {block} is free")
        _refuse_repeats(blocks, f"{owner} {holder}")
        self.prefixes.take_back(blocks)
        for block in blocks:
            names[block] = names.get(block, frozenset()) | {holder}

    def _release(self, owner: Owner, blocks: Sequence[int], holder: str) -> None:
        names = self._holders[owner]
        others = self._holders["transfer" if owner == "request" else "request"]
        published = self.prefixes.hash_of
        is_plain = not (others or published)  # nothing is published or in flight
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
            elif block in published:
                newly_cached.append(block)
            else:
                self._free.append(block)
        if newly_cached:
            self.prefixes.keep(newly_cached)

    def _take(self) -> int:
        """A block that nobody holds: one used before, one never used, or the oldest cached one."""
        if self._free:
            return self._free.pop()
        if self._num_touched < self.num_blocks:
            self._num_touched += 1
            return self._num_touched - 1
        return self.prefixes.evict()

    def _violations(self) -> list[str]:
        untouched = range(self._num_touched, self.num_blocks)
        free = frozenset((*self._free, *untouched))
        found: list[str] = []
        if len(free) != len(self._free) + len(untouched):
            found.append("a block is in the free list twice")
        for block in range(self.num_blocks):
            places = (block in free, self.prefixes.is_cached(block), self._is_held(block))
            if sum(places) != 1:
                found.append(f"block {block}: (free, cached, held) = {places}")
        if strangers := (free | self.prefixes.hash_of.keys()) - set(range(self.num_blocks)):
            found.append(f"unknown blocks {sorted(strangers)}")
        return [*found, *self.prefixes.violations(free)]


def _refuse_repeats(blocks: Sequence[int], who: str) -> None:
    if len(set(blocks)) != len(blocks):
        raise IntegrityError(f"{who}: a block is named twice in {list(blocks)}")
