"""Core data to and from protobuf messages: the one place where the two meet.

No I/O, no gRPC calls and no decisions here. The invariant: for everything that a worker is told,
`from_proto(to_proto(x))` is what it acts on, and applying the pair again changes nothing, so that a
request that is resubmitted elsewhere is the same request bit for bit.
"""

from tandem.wire.errors import error_to_failed, failed_to_error
from tandem.wire.outputs import (
    finish_reason_from_proto,
    finish_reason_to_proto,
    position_logprobs_from_proto,
    position_logprobs_to_proto,
)
from tandem.wire.requests import (
    request_from_prefill,
    request_from_submit,
    request_to_prefill,
    request_to_submit,
)
from tandem.wire.sampling import as_on_the_wire, sampling_from_proto, sampling_to_proto

PROTOCOL_VERSION = 3
"""Grows with every change that an older worker would misread; peers must have the same one."""

__all__ = [
    "PROTOCOL_VERSION",
    "as_on_the_wire",
    "error_to_failed",
    "failed_to_error",
    "finish_reason_from_proto",
    "finish_reason_to_proto",
    "position_logprobs_from_proto",
    "position_logprobs_to_proto",
    "request_from_prefill",
    "request_from_submit",
    "request_to_prefill",
    "request_to_submit",
    "sampling_from_proto",
    "sampling_to_proto",
]
