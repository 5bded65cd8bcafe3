"""Which rank of one worker sends which KV heads to which rank of another. Pure.

Invariant: every rank of the receiver gets each of its heads from exactly one rank of the sender,
which holds it. Where several ranks hold the same head, the receivers are spread over them.
"""

from __future__ import annotations

from typing import NamedTuple

from tandem.core.errors import PeerMismatchError
from tandem.kvcache.heads import HeadRange, heads_of
from tandem.v1 import worker_pb2


class Slice(NamedTuple):
    """What one rank sends to another of each piece."""

    sender: int
    receiver: int
    heads: HeadRange


def head_slices(num_kv_heads: int, senders: int, receivers: int) -> tuple[Slice, ...]:
    """Return every slice from a worker of `senders` ranks to one of `receivers`."""
    slices = []
    for receiver in range(receivers):
        wanted = heads_of(receiver, receivers, num_kv_heads)
        holders: dict[HeadRange, list[int]] = {}
        for sender in range(senders):
            if part := wanted.overlap(heads_of(sender, senders, num_kv_heads)):
                holders.setdefault(part, []).append(sender)
        for part, ranks in holders.items():
            slices.append(Slice(ranks[receiver % len(ranks)], receiver, part))
    return tuple(slices)


def check_ranks(spec: worker_pb2.KVSpec, whose: str) -> None:
    """Raise `PeerMismatchError` for a number of ranks that its KV heads do not divide over."""
    heads, ranks = spec.num_kv_heads, spec.tensor_parallel
    if not ranks or (heads % ranks and ranks % heads):
        raise PeerMismatchError(
            f"tensor_parallel is {ranks} {whose}, over {heads} KV heads: one must divide the other"
        )
