"""What goes over the wire comes out the same, and a second trip changes nothing."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core import errors
from tandem.core.request import PositionLogprobs, Request, TokenLogprob
from tandem.core.sampling import SamplingParams
from tandem.v1 import inference_pb2, worker_pb2
from tandem.wire import (
    as_on_the_wire,
    error_to_failed,
    failed_to_error,
    finish_reason_from_proto,
    finish_reason_to_proto,
    position_logprobs_from_proto,
    position_logprobs_to_proto,
    request_from_prefill,
    request_from_submit,
    request_to_prefill,
    request_to_submit,
    sampling_from_proto,
    sampling_to_proto,
)

VOCAB = 1000
token_ids = st.integers(0, VOCAB - 1)
maybe_count = st.none() | st.integers(0, 20)


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 2**32 - 1))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.floats(0, 2)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        top_k=draw(st.integers(0, 2**40)),
        min_p=draw(st.floats(0, 1)),
        repetition_penalty=draw(st.floats(0, exclude_min=True, allow_infinity=False)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-100, 100), max_size=4)),
        seed=draw(st.integers(0, 2**64 - 1)),
        logprobs=draw(maybe_count),
        prompt_logprobs=draw(maybe_count),
        stop=tuple(draw(st.lists(st.text(min_size=1, max_size=5), max_size=3))),
        stop_token_ids=tuple(draw(st.lists(token_ids, max_size=3))),
        ignore_eos=draw(st.booleans()),
        include_stop_str_in_output=draw(st.booleans()),
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    tokens = tuple(draw(st.lists(token_ids, min_size=1, max_size=20)))
    return Request(
        request_id=draw(st.text(max_size=10)),
        token_ids=tokens,
        prompt_len=draw(st.integers(1, len(tokens))),
        sampling=as_on_the_wire(draw(sampling())),
        attempt=draw(st.integers(0, 2**32 - 1)),
        priority=draw(st.integers(-(2**31), 2**31 - 1)),
        cache_salt=draw(st.text(max_size=10)),
        tenant=draw(st.text(max_size=10)),
        ttft_objective=draw(st.floats(0, 1e6)),
        itl_objective=draw(st.floats(0, 1e6)),
    )


def through_bytes(message: worker_pb2.Submit) -> worker_pb2.Submit:
    return worker_pb2.Submit.FromString(message.SerializeToString())


@given(sampling())
def test_a_second_trip_changes_nothing(params: SamplingParams) -> None:
    once = as_on_the_wire(params)
    assert as_on_the_wire(once) == once
    assert sampling_to_proto(once) == sampling_to_proto(params)


@given(sampling())
def test_valid_parameters_stay_valid(params: SamplingParams) -> None:
    params.validate(VOCAB)
    as_on_the_wire(params).validate(VOCAB)


@given(sampling())
def test_only_reals_are_rounded_and_only_to_float32(params: SamplingParams) -> None:
    once = as_on_the_wire(params)
    for name in ("max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs", "stop"):
        assert getattr(once, name) == getattr(params, name)
    assert once.stop_token_ids == params.stop_token_ids
    assert once.ignore_eos == params.ignore_eos
    assert once.top_k == min(params.top_k, 2**31 - 1)
    assert once.temperature == struct.unpack("f", struct.pack("f", params.temperature))[0]
    assert set(once.logit_bias) == set(params.logit_bias)


def test_usual_values_survive_as_a_client_wrote_them() -> None:
    once = as_on_the_wire(SamplingParams(max_tokens=5, temperature=0.7, top_p=0.95))
    assert once.temperature == pytest.approx(0.7, rel=1e-7)
    assert once.top_p == pytest.approx(0.95, rel=1e-7)
    assert as_on_the_wire(SamplingParams(max_tokens=5)) == SamplingParams(max_tokens=5)


def test_extremes_do_not_become_forbidden_values() -> None:
    tiny = as_on_the_wire(SamplingParams(max_tokens=1, top_p=1e-300, repetition_penalty=1e-300))
    assert tiny.top_p > 0
    assert tiny.repetition_penalty > 0
    huge = as_on_the_wire(SamplingParams(max_tokens=1, repetition_penalty=1e300))
    assert huge.repetition_penalty < math.inf


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_p", "top_k", "seed", "min_p"])
def test_a_field_left_to_a_default_is_refused_by_name(name: str) -> None:
    message = sampling_to_proto(SamplingParams(max_tokens=3))
    message.ClearField(name)
    with pytest.raises(errors.InvalidRequestError, match=name):
        sampling_from_proto(message)


@given(requests())
def test_submit_round_trip(request_: Request) -> None:
    target = worker_pb2.PrefillTarget(name="prefill-0", address="a:1", incarnation=7)
    message = through_bytes(request_to_submit(request_, target))
    assert request_from_submit(message) == request_
    assert message.prefill == target
    assert not request_to_submit(request_).HasField("prefill")


@given(requests())
def test_prefill_round_trip(request_: Request) -> None:
    message = request_to_prefill(request_, leg_id=5)
    assert request_from_prefill(message) == request_
    assert not message.HasField("grant")
    longer = (*request_.token_ids, 1, 2)
    granted = request_to_prefill(request_, leg_id=6, token_ids=longer, held_tokens=0)
    assert (granted.leg_id, granted.grant.leg_id) == (6, 6)
    assert granted.HasField("grant")
    assert granted.grant.held_tokens == 0
    assert request_from_prefill(granted).token_ids == longer


@pytest.mark.parametrize("prompt_len", [0, 4])
def test_a_prompt_longer_than_the_tokens_is_refused(prompt_len: int) -> None:
    message = worker_pb2.Submit(
        token_ids=[1, 2, 3],
        prompt_len=prompt_len,
        sampling=sampling_to_proto(SamplingParams(max_tokens=1)),
    )
    with pytest.raises(errors.InvalidRequestError, match="prompt_len"):
        request_from_submit(message)


logprob = st.builds(
    TokenLogprob, token_ids, st.floats(max_value=0, width=32), st.integers(1, VOCAB)
)


@given(st.builds(PositionLogprobs, logprob, st.lists(logprob, max_size=4).map(tuple)))
def test_logprobs_round_trip(position: PositionLogprobs) -> None:
    assert position_logprobs_from_proto(position_logprobs_to_proto(position)) == position


def test_finish_reasons_round_trip() -> None:
    for reason in ("stop", "length", None):
        assert finish_reason_from_proto(finish_reason_to_proto(reason)) == reason
    assert finish_reason_to_proto(None) == inference_pb2.FINISH_REASON_UNSPECIFIED
    with pytest.raises(errors.TandemError, match="77"):
        finish_reason_from_proto(77)


@pytest.mark.parametrize(
    ("error", "retriable"),
    [
        (errors.InvalidRequestError("too long"), False),
        (errors.ModelNotFoundError("no such model"), False),
        (errors.OverloadedError("full"), True),
        (errors.UnavailableError("draining"), True),
        (errors.DeadlineExceededError("prefill took too long"), True),
        (errors.StaleError("old incarnation"), True),
        (errors.TandemError("a bug"), True),
    ],
)
def test_errors_keep_class_message_and_meaning(error: errors.TandemError, retriable: bool) -> None:
    failed = error_to_failed(error, "r1", 2)
    assert (failed.request_id, failed.attempt, failed.retriable) == ("r1", 2, retriable)
    back = failed_to_error(failed)
    assert type(back) is type(error)
    assert back.message == error.message


def test_a_foreign_error_is_internal_and_named() -> None:
    failed = error_to_failed(KeyError("x"), "r1", 0)
    assert failed.grpc_code == errors.INTERNAL
    assert failed.retriable
    assert "KeyError" in failed_to_error(failed).message
