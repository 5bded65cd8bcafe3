"""The public protos to what the service takes, and back. Checks only what a proto cannot say."""

from __future__ import annotations

from tandem.core.errors import InvalidRequestError
from tandem.core.request import PositionLogprobs
from tandem.gateway.output import TextEvent, Usage
from tandem.gateway.params import SamplingOptions
from tandem.v1 import inference_pb2
from tandem.wire import finish_reason_to_proto, position_logprobs_to_proto

_OPTIONAL = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
    "prompt_logprobs",
)
MAX_REQUEST_ID_CHARACTERS = 128


def sampling_options(message: inference_pb2.SamplingParams) -> SamplingOptions:
    """Return the parameters that a client states; absent fields stay open."""
    stated = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}  # type: ignore[arg-type]
    return SamplingOptions(
        **stated,
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop_str_in_output=message.include_stop_str_in_output,
    )


def prompt_of(message: inference_pb2.GenerateRequest) -> str | tuple[int, ...]:
    """Return the prompt in the form it came. Raises `InvalidRequestError` if there is none."""
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("prompt: one of text and token_ids is required", param="prompt")
    return message.text if kind == "text" else tuple(message.token_ids.ids)


def check_request_id(request_id: str) -> None:
    """Raise `InvalidRequestError` for an id that would not fit a log line."""
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidRequestError(
            f"request_id must be at most {MAX_REQUEST_ID_CHARACTERS} characters, "
            f"got {len(request_id)}",
            param="request_id",
        )


def generate_response(request_id: str, event: TextEvent) -> inference_pb2.GenerateResponse:
    """Return the message for one event."""
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        token_ids=event.token_ids,
        text=event.text,
        logprobs=[position_logprobs_to_proto(position) for position in event.logprobs],
        prompt_logprobs=[_position(position) for position in event.prompt_logprobs or ()],
        finish_reason=finish_reason_to_proto(event.finish_reason),
        usage=_usage(event.usage),
        stop_reason="" if event.stop_reason is None else str(event.stop_reason),
    )


def _position(position: PositionLogprobs | None) -> inference_pb2.PositionLogprobs:
    """The first prompt token has no log-probability: its message is empty."""
    if position is None:
        return inference_pb2.PositionLogprobs()
    return position_logprobs_to_proto(position)


def _usage(usage: Usage | None) -> inference_pb2.Usage | None:
    if usage is None:
        return None
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
