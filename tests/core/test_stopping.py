"""Why a sequence ends."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.core.request import FinishReason, Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.core.stopping import finish_reason

EOS = (2, 3)


def reason(output: list[int], max_model_len: int = 100, **sampling: Any) -> FinishReason | None:
    params = SamplingParams(**{"max_tokens": 10, **sampling})
    seq = Sequence(Request("a", (2, 7, 3), 3, params), arrival=0)
    seq.token_ids.extend(output)
    return finish_reason(seq, EOS, max_model_len)


@pytest.mark.parametrize(
    ("output", "sampling", "expected"),
    [
        ([5], {}, None),
        ([5, 2], {}, "stop"),
        ([5, 3], {}, "stop"),
        ([2, 5], {}, None),
        ([5, 2], {"ignore_eos": True}, None),
        ([5, 9], {"stop_token_ids": (9,)}, "stop"),
        ([5, 9], {"stop_token_ids": (9,), "ignore_eos": True}, "stop"),
        ([5, 2], {"stop_token_ids": (2,), "ignore_eos": True}, "stop"),
        ([5] * 9, {}, None),
        ([5] * 10, {}, "length"),
        ([*[5] * 9, 2], {}, "stop"),
        ([5, 2], {"min_tokens": 3}, None),
        ([5, 5, 2], {"min_tokens": 3}, "stop"),
        ([5, 9], {"min_tokens": 3, "stop_token_ids": (9,)}, None),
        ([5] * 4, {"min_tokens": 4, "max_tokens": 4}, "length"),
    ],
)
def test_reason(output: list[int], sampling: dict[str, Any], expected: FinishReason | None) -> None:
    assert reason(output, **sampling) == expected


def test_the_context_ends_it_even_before_min_tokens() -> None:
    assert reason([5], max_model_len=5, min_tokens=8) is None
    assert reason([5, 5], max_model_len=5, min_tokens=8) == "length"


def test_a_prompt_that_ends_with_eos_has_not_stopped() -> None:
    assert reason([]) is None
