"""Prefix events over the wire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.errors import InvalidRequestError
from tandem.core.prefix_events import KEY_BYTES, PrefixEvents
from tandem.v1 import worker_pb2
from tandem.wire.prefixes import prefix_events_from_proto, prefix_events_to_proto

keys = st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), max_size=5).map(tuple)
events = st.builds(
    PrefixEvents,
    number=st.integers(0, 2**64 - 1),
    reset=st.booleans(),
    stored=keys,
    evicted=keys,
    host_stored=keys,
    host_evicted=keys,
    host_value=st.floats(0, 1),
    prompt_token_seconds=st.floats(0, 1),
)


@given(events)
def test_events_come_out_as_they_went_in(sent: PrefixEvents) -> None:
    data = prefix_events_to_proto(sent).SerializeToString()
    assert prefix_events_from_proto(worker_pb2.PrefixEvents.FromString(data)) == sent


@given(st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), max_size=4096, unique=True))
def test_a_change_costs_eight_bytes(stored: list[bytes]) -> None:
    message = prefix_events_to_proto(PrefixEvents(1, stored=tuple(stored)))
    assert message.ByteSize() <= KEY_BYTES * len(stored) + 16


def test_a_piece_of_a_key_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="9 bytes"):
        prefix_events_from_proto(worker_pb2.PrefixEvents(number=1, stored=b"x" * 9))
