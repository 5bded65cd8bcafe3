"""Between a link's own data and its control messages. No state, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.tracing.buffer import PieceRef
from tandem.transfer.receive_ledger import PieceRange
from tandem.transfer.send_ledger import Outgoing
from tandem.transfer.types import Piece
from tandem.v1 import worker_pb2

LinkMessage = worker_pb2.LinkMessage


def announcement(batch: Sequence[Outgoing]) -> LinkMessage:
    """The next pieces on their way, in one send."""
    first, *more = (_announce(outgoing) for outgoing in batch)
    first.more.extend(more)
    return LinkMessage(announce=first)


def _announce(outgoing: Outgoing) -> worker_pb2.LinkAnnounce:
    piece = outgoing.piece
    return worker_pb2.LinkAnnounce(
        sequence_number=outgoing.sequence_number,
        leg_id=piece.leg_id,
        chunk=piece.chunk,
        first_layer=piece.first_layer,
        num_layers=piece.num_layers,
        start=piece.start,
        num_tokens=len(piece.slots),
    )


def piece_range(announce: worker_pb2.LinkAnnounce) -> PieceRange:
    """Which KV was announced."""
    return PieceRange(
        announce.leg_id,
        announce.first_layer,
        announce.num_layers,
        announce.start,
        announce.num_tokens,
    )


def ref(piece: Piece) -> PieceRef:
    """A piece's name in a trace."""
    return PieceRef(
        piece.leg_id, piece.start, len(piece.slots), piece.first_layer, piece.num_layers
    )


def ref_of_range(piece: PieceRange) -> PieceRef:
    """The same name, at the other end."""
    return PieceRef(
        piece.leg_id, piece.start, piece.num_tokens, piece.first_layer, piece.num_layers
    )


def opened(error: str = "") -> LinkMessage:
    """The answer to a LinkOpen; empty: come in."""
    return LinkMessage(opened=worker_pb2.LinkOpened(error=error))


def connect() -> LinkMessage:
    """Both agree and are awake: the opener makes the group now."""
    return LinkMessage(connect=worker_pb2.LinkConnect())


def acknowledgement(sequence_number: int) -> LinkMessage:
    """Every piece up to this one has been dealt with."""
    return LinkMessage(ack=worker_pb2.LinkAck(sequence_number=sequence_number))


def broken(reason: str) -> LinkMessage:
    """This epoch is over."""
    return LinkMessage(broken=worker_pb2.LinkBroken(reason=reason))


def closed() -> LinkMessage:
    """This epoch was closed while it was idle."""
    return LinkMessage(closed=worker_pb2.LinkClosed())
