"""Sequences whose KV comes from elsewhere: a prefill worker, or the host tier.

They hold their blocks from the start, and compute nothing until they run.
"""

from __future__ import annotations

from tandem.core.sequence import Sequence
from tandem.scheduler.holdings import Holdings
from tandem.scheduler.phases import Phases


class Receiving:
    """What lands of their KV, and how they come to run."""

    def __init__(self, phases: Phases, holdings: Holdings, block_size: int) -> None:
        self._phases = phases
        self._holdings = holdings
        self._block_size = block_size

    def landed(self, seq: Sequence, num_tokens: int) -> None:
        """Note that a receiving sequence has the KV of its first `num_tokens` tokens in place."""
        self._require_receiving(seq)
        if num_tokens > seq.num_tokens:
            raise ValueError(f"{seq.holder}: KV of {num_tokens} of {seq.num_tokens} tokens")
        start, seq.num_computed = seq.num_computed, max(seq.num_computed, num_tokens)
        # The newest token may be computed here after all (`fall_back`), and a block that others can
        # find is never written again: so the block of the newest token is published by `join`.
        self._holdings.publish(seq, start, min(seq.num_computed, seq.num_tokens - 1))

    def join(self, seq: Sequence) -> None:
        """Let a receiving sequence decode: all KV but the newest token's must be in place."""
        self._require_receiving(seq)
        if seq.num_computed < seq.num_tokens - 1:
            raise ValueError(
                f"{seq.holder} cannot join: KV of {seq.num_computed} of {seq.num_tokens} tokens"
            )
        self._start_running(seq)

    def fall_back(self, seq: Sequence) -> None:
        """Let a receiving sequence compute what has not landed itself; it keeps its blocks."""
        self._require_receiving(seq)
        seq.num_computed = min(seq.num_computed, seq.num_tokens - 1)
        self._start_running(seq)

    def hand_out(self, seq: Sequence) -> None:
        """Let a prefill worker compute what is left of a running prompt: `fall_back` undone.

        It keeps its blocks and what is in them. Raises ValueError, naming what is amiss, unless it
        runs, has two tokens or more to compute, and holds blocks for all of its tokens.
        """
        if seq.phase != "running":
            raise ValueError(f"{seq.holder} is {seq.phase}, not running: it cannot be sent out")
        if seq.num_uncomputed < 2:
            raise ValueError(f"{seq.holder} has {seq.num_uncomputed} tokens to compute, not 2")
        if seq.num_tokens > len(seq.block_table) * self._block_size:
            raise ValueError(
                f"{seq.holder} has {len(seq.block_table)} blocks of {self._block_size} for "
                f"{seq.num_tokens} tokens: KV of all of them could not come back"
            )
        seq.remote = True
        self._phases.move(seq, "receiving")

    def _start_running(self, seq: Sequence) -> None:
        seq.remote = False
        self._phases.move(seq, "running")
        self._holdings.publish(seq, 0, seq.num_computed)

    def _require_receiving(self, seq: Sequence) -> None:
        if seq.phase != "receiving":
            raise ValueError(f"{seq.holder} is {seq.phase}, not receiving")
