"""Recorded events to and from protobuf."""

from __future__ import annotations

from tandem.timeline.events import STAGES, Part, StageName
from tandem.tracing.buffer import (
    Event,
    IterationEvent,
    LandedEvent,
    LegEvent,
    PieceRef,
    SentEvent,
    StageEvent,
    time_of,
)
from tandem.v1 import tracing_pb2

_KNOWN: dict[str, StageName] = {name: name for name in STAGES}


def event_to_proto(event: Event) -> tracing_pb2.TraceEvent:
    """Return an event as it travels."""
    message = tracing_pb2.TraceEvent(at=time_of(event))
    match event:
        case IterationEvent():
            message.iteration.began = event.began
            for request, start, length, is_decode in event.parts:
                message.iteration.parts.add(
                    request_id=request, start=start, length=length, is_decode=is_decode
                )
        case StageEvent():
            message.stage.request_id, message.stage.name = event.request, event.name
        case LegEvent():
            message.leg.request_id, message.leg.leg_id = event.request, event.leg_id
        case SentEvent():
            message.sent.CopyFrom(
                tracing_pb2.TracedSend(
                    peer=event.peer,
                    piece=_piece_to_proto(event.piece),
                    began=event.began,
                    packed=event.packed,
                    announced=event.announced,
                )
            )
        case LandedEvent():
            piece = _piece_to_proto(event.piece)
            message.landed.CopyFrom(tracing_pb2.TracedLanding(peer=event.peer, piece=piece))
    return message


def event_from_proto(message: tracing_pb2.TraceEvent) -> Event | None:
    """Return what was recorded; None for something that a newer process knows and we do not."""
    match message.WhichOneof("kind"):
        case "iteration":
            parts = tuple(
                Part(part.request_id, part.start, part.length, part.is_decode)
                for part in message.iteration.parts
            )
            return IterationEvent(message.iteration.began, message.at, parts)
        case "stage":
            name = _KNOWN.get(message.stage.name)
            return StageEvent(message.at, message.stage.request_id, name) if name else None
        case "leg":
            return LegEvent(message.at, message.leg.request_id, message.leg.leg_id)
        case "sent":
            sent = message.sent
            piece = _piece_from_proto(sent.piece)
            times = (sent.began, sent.packed, sent.announced)
            return SentEvent(message.at, sent.peer, piece, *times)
        case "landed":
            piece = _piece_from_proto(message.landed.piece)
            return LandedEvent(message.at, message.landed.peer, piece)
        case _:
            return None


def _piece_to_proto(piece: PieceRef) -> tracing_pb2.TracedPiece:
    return tracing_pb2.TracedPiece(
        leg_id=piece.leg_id,
        start=piece.start,
        length=piece.length,
        first_layer=piece.first_layer,
        num_layers=piece.num_layers,
    )


def _piece_from_proto(piece: tracing_pb2.TracedPiece) -> PieceRef:
    return PieceRef(piece.leg_id, piece.start, piece.length, piece.first_layer, piece.num_layers)
