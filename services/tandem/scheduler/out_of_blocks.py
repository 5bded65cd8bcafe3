"""What happens when a running sequence lacks a block and the pool has none: who gives way, and how.

What the ways cost is estimated in `preemption`. Nobody is preempted by one that comes after it by
`Policy.precedence`, and nobody whose blocks an iteration under way writes.
"""

from __future__ import annotations

from collections import Counter

from tandem.core.sequence import Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.scheduler.draft import Draft
from tandem.scheduler.holdings import Holdings
from tandem.scheduler.host_copies import HostCopies
from tandem.scheduler.phases import Phases
from tandem.scheduler.policies import Policy
from tandem.scheduler.preemption import Options, Preemption, Way


class OutOfBlocks:
    """Gets blocks for sequences that run, from others if need be."""

    def __init__(
        self,
        pool: BlockPool,
        phases: Phases,
        holdings: Holdings,
        host: HostCopies | None,
        preemption: Preemption,
        policy: Policy,
        max_model_len: int,
    ) -> None:
        self._pool = pool
        self._phases = phases
        self._holdings = holdings
        self._host = host
        self._preemption = preemption
        self._policy = policy
        self._max_model_len = max_model_len
        self._stalled: set[Sequence] = set()  # those that wait for a block
        self.num_preempted: Counter[Way] = Counter()
        """Sequences that gave way, or waited for a block, since the start."""

    def forget(self, seq: Sequence) -> None:
        """A sequence has ended."""
        self._stalled.discard(seq)

    def secure(self, seq: Sequence, num_tokens: int, draft: Draft) -> bool:
        """Get the blocks that `seq` lacks for its first `num_tokens` tokens, preempting the last if
        need be. False: not in this iteration."""
        missing = self._holdings.num_blocks(num_tokens) - len(seq.block_table)
        while not self._pool.can_allocate(missing):
            if draft.must_settle or not self._make_room(seq, missing, draft):
                return False
        self._holdings.extend(seq, missing)
        self._stalled.discard(seq)
        return True

    def _make_room(self, seq: Sequence, missing: int, draft: Draft) -> bool:
        """Let somebody give way; False if `seq` cannot go on in this iteration.

        Because it waits for a block, was itself the last, or the last is under way: then nobody is
        admitted before it can be preempted.
        """
        draft.admits = False
        coming = self._host.tier.num_coming_free if self._host is not None else 0
        if coming and self._pool.can_allocate(missing - coming):
            return False
        victim = max(self._phases.running, key=self._policy.precedence)
        way = self._preemption.choose(self._options(seq, victim, draft))
        if way == "wait":
            draft.waits = True
            self.num_preempted["wait"] += seq not in self._stalled
            self._stalled.add(seq)
            return False
        if victim.num_under_way:
            draft.must_settle = True
            return False
        self._preempt(victim, way, draft)
        return victim is not seq

    def _options(self, seq: Sequence, victim: Sequence, draft: Draft) -> Options:
        """What each way to a block would cost."""
        preemption, wait, swap = self._preemption, None, None
        remaining = self._shortest_sure_to_end(seq) if draft.may_wait else None
        if remaining is not None:
            wait = preemption.wait_seconds(remaining)
        to_swap = self._host.num_blocks_to_swap(victim) if self._host is not None else 0
        if to_swap:
            swap = preemption.swap_seconds(to_swap)
        return Options(wait, swap, preemption.refill_seconds(victim.num_computed))

    def _shortest_sure_to_end(self, waits: Sequence) -> int | None:
        """Return the most tokens that one of the others can still produce, of those that need no
        more blocks for them; the fewest of these. None: nobody is sure to end.

        To wait for one that may itself come to wait for a block would be a deadlock.
        """
        block_size = self._pool.block_size
        fewest: int | None = None
        for seq in self._phases.running:
            most = min(seq.request.max_len, self._max_model_len)
            if seq is waits or most - 1 > len(seq.block_table) * block_size:
                continue
            remaining = most - len(seq.token_ids)
            fewest = remaining if fewest is None else min(fewest, remaining)
        return fewest

    def _preempt(self, victim: Sequence, way: Way, draft: Draft) -> None:
        """Take a sequence's blocks; one that was admitted in this very plan only goes back."""
        draft.drop_chunk(victim)
        if victim in draft.admitted:
            draft.admitted.remove(victim)
            self._phases.leave(victim, "waiting")
            return
        victim.was_preempted = True
        self.num_preempted[way] += 1
        if way == "swap" and self._host is not None:
            self._host.swap_out(victim, victim.holder)
            self._phases.leave(victim, "waiting")
        else:
            self._phases.leave(victim, "preempted")
            draft.preempted.append(victim)
