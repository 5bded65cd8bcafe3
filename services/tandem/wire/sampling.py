"""Sampling parameters on the wire.

Inside the cluster every field travels explicitly; defaults are the gateway's business alone, so a
message that leaves a field out is refused. A proto `float` has 32 bits: what a worker acts on is
the value rounded to float32, on the first submission and on every later one. `as_on_the_wire`
gives the parameters in that form; the conversion is idempotent from there on.
"""

from __future__ import annotations

import struct
from types import MappingProxyType

from tandem.core.errors import InvalidRequestError
from tandem.core.sampling import SamplingParams
from tandem.v1 import inference_pb2

_SMALLEST_FLOAT32 = 2.0**-149
_LARGEST_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127
_LARGEST_INT32 = 2**31 - 1
_REQUIRED = (
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
)


def sampling_to_proto(params: SamplingParams) -> inference_pb2.SamplingParams:
    """Return the message with every field set; only an absent `logprobs` stays absent.

    Values that must be positive stay positive however small they are, and `top_k` is capped at what
    its field holds, which is past every vocabulary and so means the same.
    """
    message = inference_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=_float32(params.temperature),
        top_p=max(_float32(params.top_p), _SMALLEST_FLOAT32),
        top_k=min(params.top_k, _LARGEST_INT32),
        min_p=_float32(params.min_p),
        repetition_penalty=max(_float32(params.repetition_penalty), _SMALLEST_FLOAT32),
        presence_penalty=_float32(params.presence_penalty),
        frequency_penalty=_float32(params.frequency_penalty),
        logit_bias={token_id: _float32(bias) for token_id, bias in params.logit_bias.items()},
        seed=params.seed,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )
    if params.logprobs is not None:
        message.logprobs = params.logprobs
    if params.prompt_logprobs is not None:
        message.prompt_logprobs = params.prompt_logprobs
    return message


def sampling_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Return the parameters of a complete message.

    Raises `InvalidRequestError` naming the first field that was left to a default.
    """
    for name in _REQUIRED:
        if not message.HasField(name):  # type: ignore[arg-type]
            raise InvalidRequestError(f"sampling.{name} is missing", param=name)
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=MappingProxyType(dict(message.logit_bias)),
        seed=message.seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop_str_in_output=message.include_stop_str_in_output,
    )


def as_on_the_wire(params: SamplingParams) -> SamplingParams:
    """Return the parameters as every worker sees them: reals rounded to float32."""
    return sampling_from_proto(sampling_to_proto(params))


def _float32(value: float) -> float:
    """Return the nearest finite float32."""
    bounded = min(max(value, -_LARGEST_FLOAT32), _LARGEST_FLOAT32)
    rounded: float = struct.unpack("<f", struct.pack("<f", bounded))[0]
    return rounded
