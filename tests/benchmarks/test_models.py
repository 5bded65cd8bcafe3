"""The random-weight model: the real shape, made once, whole or not at all."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
from benchmarks import models
from safetensors import safe_open
from tokenizers import Tokenizer

SMALL = {
    **models.QWEN_SHAPE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 600,
}


def test_the_shape_is_that_of_qwen_0_5b() -> None:
    """Its published size: 494 million parameters, the embedding counted once."""
    shape = models.QWEN_SHAPE
    hidden, kv = shape["hidden_size"], 2 * 64
    attention = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv
    layer = attention + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    total = shape["vocab_size"] * hidden + shape["num_hidden_layers"] * layer + hidden

    assert total == 494_032_768


def test_the_model_has_every_tensor_and_a_text_for_every_id(tmp_path: Path) -> None:
    directory = models.qwen_shaped_model(tmp_path, SMALL)

    with safe_open(directory / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.get_slice("model.layers.1.self_attn.k_proj.weight").get_shape() == [16, 32]
    assert len(names) == 2 + 2 * 12
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 600
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.decode(tokenizer.encode("any text").ids) == "any text"
    assert all(tokenizer.decode([number]) for number in range(300, 600))


def test_the_small_shape_has_15_million_parameters_and_no_biases(tmp_path: Path) -> None:
    directory = models.llama_shaped_model(tmp_path)

    with safe_open(directory / "model.safetensors", "pt") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    assert sum(prod(size) for size in sizes) == pytest.approx(15.2e6, rel=0.01)
    assert len(sizes) == 2 + 6 * 9


def test_made_up_words_are_made_by_merges(tmp_path: Path) -> None:
    directory = models.qwen_shaped_model(tmp_path, {**SMALL, "vocab_size": 2000})
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    word = tokenizer.id_to_token(1999)
    assert tokenizer.encode(word.replace("Ġ", " ")).ids == [1999]


def test_it_is_made_once_and_always_alike(tmp_path: Path) -> None:
    first = models.qwen_shaped_model(tmp_path / "a", SMALL)
    made_at = (first / "config.json").stat().st_mtime_ns
    second = models.qwen_shaped_model(tmp_path / "b", SMALL)

    assert models.qwen_shaped_model(tmp_path / "a", SMALL) == first
    assert (first / "config.json").stat().st_mtime_ns == made_at
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "FREE_BYTES_NEEDED", 2**62)

    with pytest.raises(OSError, match="GiB free"):
        models.qwen_shaped_model(tmp_path, SMALL)

    assert list(tmp_path.iterdir()) == []
