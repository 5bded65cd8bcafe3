"""Prefix events <-> protobuf: keys travel one after the other, as bytes."""

from __future__ import annotations

from tandem.core.errors import InvalidRequestError
from tandem.core.prefix_events import KEY_BYTES, PrefixEvents
from tandem.v1 import worker_pb2


def prefix_events_to_proto(events: PrefixEvents) -> worker_pb2.PrefixEvents:
    """Return the message."""
    return worker_pb2.PrefixEvents(
        number=events.number,
        reset=events.reset,
        stored=b"".join(events.stored),
        evicted=b"".join(events.evicted),
        host_stored=b"".join(events.host_stored),
        host_evicted=b"".join(events.host_evicted),
        host_value=events.host_value,
        prompt_token_seconds=events.prompt_token_seconds,
    )


def prefix_events_from_proto(message: worker_pb2.PrefixEvents) -> PrefixEvents:
    """Return the events. Raises `InvalidRequestError` for a piece of a key."""
    return PrefixEvents(
        message.number,
        message.reset,
        _keys(message.stored),
        _keys(message.evicted),
        _keys(message.host_stored),
        _keys(message.host_evicted),
        message.host_value,
        message.prompt_token_seconds,
    )


def _keys(packed: bytes) -> tuple[bytes, ...]:
    if len(packed) % KEY_BYTES:
        raise InvalidRequestError(f"{len(packed)} bytes are no whole number of prefix keys")
    return tuple(packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES))
