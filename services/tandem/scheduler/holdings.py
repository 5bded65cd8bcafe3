"""The blocks that sequences hold: found by their prefix, allocated, published, given back.

Whether a sequence may have them is the scheduler's decision, and from whom they are taken that of
`out_of_blocks`. A sequence's block table changes nowhere else, except when it gets a new one here:
tables only grow.
"""

from __future__ import annotations

from tandem.core.sequence import Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.kvcache.hashing import extend_hashes
from tandem.scheduler.host_copies import HostCopies


class Holdings:
    """What the sequences of one worker hold of its pool."""

    def __init__(self, pool: BlockPool, host: HostCopies | None) -> None:
        self._pool = pool
        self._host = host

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many blocks so many tokens take."""
        return -(-num_tokens // self._pool.block_size)

    def num_unused_slots(self, seq: Sequence) -> int:
        """Slots of its blocks that neither a known token nor the next one takes."""
        slots = len(seq.block_table) * self._pool.block_size
        return max(0, slots - seq.num_tokens - seq.num_in_flight - 1)

    def reserve(self, seq: Sequence, spare: int) -> bool:
        """Share the cached prefix and allocate the rest and room for one more token, or do nothing.

        `spare` blocks must stay free.
        """
        host, holder = self._host, seq.holder
        if host is not None and host.is_copying(seq):
            return False
        hashes = self.findable_hashes(seq)
        matched = self._pool.match_prefix(hashes)
        found = host.find(seq, len(matched), hashes) if host is not None else None
        missing = self.num_blocks(seq.num_tokens + 1) - len(matched)
        if not self._pool.can_allocate(missing + self._pool.num_unheld(matched) + spare):
            return False
        self._pool.share(matched, holder)
        seq.block_table = matched + self._pool.allocate(missing, holder)
        seq.num_computed = seq.num_cached = len(matched) * self._pool.block_size
        if host is not None and found is not None:
            target = seq.block_table[len(matched) : len(matched) + len(found.blocks)]
            host.copy_back(seq, found, target, holder)
            seq.num_cached = found.num_tokens
        elif host is not None:
            host.drop(seq, holder)
        return True

    def extend(self, seq: Sequence, num_blocks: int) -> None:
        """Allocate more blocks for a sequence that holds some. Raises `OutOfBlocksError`."""
        seq.block_table.extend(self._pool.allocate(num_blocks, seq.holder))

    def release(self, seq: Sequence) -> None:
        """Give back everything that a sequence holds; what a transfer still holds stays held."""
        self._pool.release(seq.block_table, seq.holder)
        seq.block_table = []
        seq.num_computed = seq.num_in_flight = 0

    def publish(self, seq: Sequence, start: int, end: int) -> None:
        """Make the blocks findable that are full now that tokens [start, end) have their KV."""
        blocks = range(start // self._pool.block_size, end // self._pool.block_size)
        if not blocks or not self._pool.prefix_cache:
            return
        self._extend_hashes(seq)
        for index in blocks:
            parent = seq.block_hashes[index - 1] if index else b""
            self._pool.publish(seq.block_table[index], seq.block_hashes[index], parent)

    def findable_hashes(self, seq: Sequence) -> list[bytes]:
        """The hashes of the blocks that it need not compute if they are found; at least one token
        stays to compute.

        Prompt logprobs come out of computing the prompt: until they have, nothing is skipped.
        """
        asked_logprobs = seq.request.sampling.prompt_logprobs is not None
        if not self._pool.prefix_cache or (asked_logprobs and seq.num_output_tokens == 0):
            return []
        self._extend_hashes(seq)
        return seq.block_hashes[: (seq.num_tokens - 1) // self._pool.block_size]

    def _extend_hashes(self, seq: Sequence) -> None:
        salt = seq.request.cache_salt
        extend_hashes(seq.block_hashes, seq.token_ids, self._pool.block_size, salt)
