"""What comes out of a worker, on the wire: log-probabilities and finish reasons.

Log-probabilities are float32 where they are computed, so nothing is lost on the way.
"""

from __future__ import annotations

from tandem.core.errors import TandemError
from tandem.core.request import FinishReason, PositionLogprobs, TokenLogprob
from tandem.v1 import inference_pb2

_TO_PROTO: dict[FinishReason | None, inference_pb2.FinishReason.ValueType] = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}
_FROM_PROTO: dict[int, FinishReason | None] = {value: key for key, value in _TO_PROTO.items()}


def position_logprobs_to_proto(position: PositionLogprobs) -> inference_pb2.PositionLogprobs:
    """Return the message for one position."""
    return inference_pb2.PositionLogprobs(
        chosen=_token_to_proto(position.chosen),
        top=[_token_to_proto(token) for token in position.top],
    )


def position_logprobs_from_proto(message: inference_pb2.PositionLogprobs) -> PositionLogprobs:
    """Return one position; the alternatives keep their order, best first."""
    return PositionLogprobs(
        chosen=_token_from_proto(message.chosen),
        top=tuple(_token_from_proto(token) for token in message.top),
    )


def finish_reason_to_proto(reason: FinishReason | None) -> inference_pb2.FinishReason.ValueType:
    """Return the enum value; None, a sequence that goes on, is UNSPECIFIED."""
    return _TO_PROTO[reason]


def finish_reason_from_proto(value: int) -> FinishReason | None:
    """Return the finish reason, None for a sequence that goes on.

    Raises `TandemError` for a value that this protocol version does not know.
    """
    if value not in _FROM_PROTO:
        raise TandemError(f"finish_reason {value} is unknown to this version")
    return _FROM_PROTO[value]


def _token_to_proto(token: TokenLogprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=token.token_id, logprob=token.logprob, rank=token.rank
    )


def _token_from_proto(message: inference_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, message.rank)
