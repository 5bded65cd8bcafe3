"""Sequences whose KV is in host memory, or on its way there or back.

Holds no rule about who or when: the scheduler asks, and changes the phases. Invariant: a sequence
waits for one copy at most, and its hold in the host tier ends with it or once its KV is back.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

from tandem.core.sequence import Sequence
from tandem.kvcache.host_tier import BlockCopy, CopyKind, HostTier
from tandem.scheduler.preemption import Preemption


class InHost(NamedTuple):
    """What the host tier has of a sequence beyond what the device has."""

    blocks: tuple[int, ...]
    num_tokens: int
    """From the start of the sequence: its tokens that are complete once these are copied back."""


class HostCopies:
    """The host tier of one worker, as its scheduler uses it."""

    def __init__(self, tier: HostTier, preemption: Preemption) -> None:
        self.tier = tier
        self._preemption = preemption
        self._copies: dict[Sequence, tuple[BlockCopy, int]] = {}  # and tokens complete after it

    def is_copying(self, seq: Sequence) -> bool:
        """Whether a sequence waits for a copy to end."""
        return seq in self._copies

    def num_blocks_to_swap(self, seq: Sequence) -> int:
        """Blocks with computed KV of a sequence; 0: there is nothing, or no room for it."""
        number = -(-seq.num_computed // self.tier.device.block_size)
        return number if self.tier.can_swap_out(number) else 0

    def swap_out(self, seq: Sequence, holder: str) -> None:
        """Begin to copy a sequence's KV; the caller takes its blocks next."""
        blocks = seq.block_table[: self.num_blocks_to_swap(seq)]
        copy = self.tier.swap_out(blocks, holder)
        seq.host_blocks, seq.num_in_host = list(copy.host_blocks), seq.num_computed
        self._copies[seq] = (copy, seq.num_in_host)

    def find(self, seq: Sequence, num_matched: int, hashes: Rows[bytes]) -> InHost | None:
        """Return what to copy back for a sequence whose first `num_matched` blocks are cached on
        the device. `hashes`: of its blocks that may be found by their prefix."""
        block_size = self.tier.device.block_size
        if seq.host_blocks:
            blocks = tuple(seq.host_blocks[num_matched:])
            return InHost(blocks, seq.num_in_host) if blocks else None
        blocks = tuple(self.tier.match_prefix(hashes[num_matched:]))
        num_tokens = len(blocks) * block_size
        if not blocks or not self._preemption.restore_pays(len(blocks), num_tokens):
            return None
        return InHost(blocks, (num_matched + len(blocks)) * block_size)

    def copy_back(
        self, seq: Sequence, found: InHost, device_blocks: Rows[int], holder: str
    ) -> None:
        """Begin to copy back what `find` returned, into blocks that the sequence holds."""
        kind: CopyKind = "swap_in" if seq.host_blocks else "restore"
        copy = self.tier.copy_in(kind, found.blocks, device_blocks)
        self._copies[seq] = (copy, found.num_tokens)
        self.drop(seq, holder)

    def drop(self, seq: Sequence, holder: str) -> None:
        """Let go of what the host tier holds for a sequence."""
        if seq.host_blocks:
            self.tier.pool.release(seq.host_blocks, holder)
            seq.host_blocks, seq.num_in_host = [], 0

    def left(self, seq: Sequence) -> None:
        """The sequence waits for its copy no more; the copy goes on."""
        self._copies.pop(seq, None)

    def done(self, copy: BlockCopy, seconds: float, succeeded: bool) -> tuple[Sequence, int] | None:
        """Take the end of a copy. Returns the sequence that waited for it, if there is one, and how
        many of its tokens are complete."""
        self.tier.done(copy, succeeded)
        if succeeded:
            self._preemption.copied(len(copy.host_blocks), seconds, copy.to_host)
        for seq, (its_copy, num_tokens) in self._copies.items():
            if its_copy is copy:
                del self._copies[seq]
                return seq, num_tokens if succeeded else 0
        return None
