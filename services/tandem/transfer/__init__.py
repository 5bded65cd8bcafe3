"""One-way KV links between two workers: the only package that opens process groups.

Packs KV out of one worker's blocks and scatters it into another's. What a request or a sequence is,
when its blocks are allocated or freed and over which stream control messages travel is decided
elsewhere. Invariant: blocks are touched only between a leg's opening and its closing event.
"""

from tandem.transfer.budget import LinkBudget
from tandem.transfer.group import LinkError, Rendezvous
from tandem.transfer.peer import PeerTransfer
from tandem.transfer.rank_links import RankLinks
from tandem.transfer.ranked import NO_OTHERS, OtherRanks, RankedTransfer
from tandem.transfer.spec import check_kv_spec, make_kv_spec, resolve_backend
from tandem.transfer.stats import TransferStats
from tandem.transfer.types import KVBlocks, Piece, TransferEvents

__all__ = [
    "NO_OTHERS",
    "KVBlocks",
    "LinkBudget",
    "LinkError",
    "OtherRanks",
    "PeerTransfer",
    "Piece",
    "RankLinks",
    "RankedTransfer",
    "Rendezvous",
    "TransferEvents",
    "TransferStats",
    "check_kv_spec",
    "make_kv_spec",
    "resolve_backend",
]
