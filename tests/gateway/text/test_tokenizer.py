"""Tokenizer files are read as Hugging Face writes them, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.core.errors import InvalidRequestError, ModelLoadError
from tandem.gateway.text.tokenizer import load_tokenizer


def test_special_tokens_come_with_the_text_or_not(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    plain = tokenizer.encode("fox", add_special_tokens=False)
    assert tokenizer.encode("fox") == [0, *plain]
    assert tokenizer.decode([0, *plain]) == "fox"
    assert tokenizer.named_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


def test_add_bos_token_of_the_config_is_honoured(model_dir: Path, tmp_path: Path) -> None:
    spec = json.loads((model_dir / "tokenizer.json").read_text())
    spec["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<|bos|>", "add_bos_token": true}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.encode("<|bos|>a").count(0) == 1
    assert 0 not in tokenizer.encode("a", add_special_tokens=False)


def test_truncation_settings_of_the_file_do_not_cut_prompts(
    model_dir: Path, tmp_path: Path
) -> None:
    spec = json.loads((model_dir / "tokenizer.json").read_text())
    spec["truncation"] = {
        "max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert len(load_tokenizer(tmp_path).encode("the quick brown fox")) > 2


def test_a_token_that_is_half_a_character_is_written_as_bytes(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    half = next(i for i in range(4, 320) if tokenizer.token_bytes(i) == b"\xf0")
    assert tokenizer.token_text(half) == "bytes:\\xf0"
    assert tokenizer.token_text(0) == "<|bos|>"
    assert tokenizer.token_bytes(100_000) == b""


def test_text_without_utf8_form_is_a_bad_request(model_dir: Path) -> None:
    with pytest.raises(InvalidRequestError):
        load_tokenizer(model_dir).encode("a\ud800b")


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_missing_or_damaged_files_are_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
