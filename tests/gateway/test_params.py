"""Defaults come from the request, the model, the endpoint and the system, in this order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.core.errors import InvalidRequestError
from tandem.gateway.interfaces import ModelInfo
from tandem.gateway.model import load_served_model
from tandem.gateway.params import SamplingOptions, complete_sampling

INFO = ModelInfo("tiny", "/nowhere", 100, 16, 320)


@pytest.mark.parametrize(
    ("request_", "model", "endpoint", "prompt_len", "expected"),
    [
        (7, 50, 16, 10, 7),
        (None, 50, 16, 10, 50),
        (None, None, 16, 10, 16),
        (None, None, None, 10, 90),
        (None, 500, None, 10, 90),
        (None, None, 16, 95, 5),
        (90, None, None, 10, 90),
    ],
)
def test_max_tokens(
    request_: int | None, model: int | None, endpoint: int | None, prompt_len: int, expected: int
) -> None:
    options = SamplingOptions(max_tokens=request_, default_max_tokens=endpoint)
    defaults = {} if model is None else {"max_new_tokens": model}
    assert complete_sampling(options, prompt_len, INFO, defaults).max_tokens == expected


def test_an_explicit_length_over_the_context_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"100 tokens, but 101 .* 10 .* 91") as caught:
        complete_sampling(SamplingOptions(max_tokens=91), 10, INFO, {})
    assert caught.value.code == "context_length_exceeded"


def test_the_models_defaults_fill_gaps_only() -> None:
    defaults = {"temperature": 0.0, "top_p": 0.5, "top_k": 40, "repetition_penalty": 1.2}
    params = complete_sampling(SamplingOptions(top_p=1.0), 1, INFO, defaults)
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 1.0, 40)
    assert params.repetition_penalty == 1.2


def test_minus_one_turns_top_k_off() -> None:
    assert complete_sampling(SamplingOptions(top_k=-1), 1, INFO, {"top_k": 40}).top_k == 0


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"temperature": 0.6, "top_k": 20, "do_sample": True, "eos_token_id": [1, 2]},
         {"temperature": 0.6, "top_k": 20}),
        ({"temperature": None, "max_new_tokens": 32}, {"max_new_tokens": 32}),
        (None, {}),
    ],
)  # fmt: skip
def test_generation_config_is_read(
    model_dir: Path, tmp_path: Path, written: dict[str, Any] | None, read: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    model = load_served_model(ModelInfo("tiny", str(tmp_path), 100, 16, 320))
    assert dict(model.defaults) == read
    assert model.chat_template is None
