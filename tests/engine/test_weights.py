"""Checkpoints: one file or several, and every way in which they can be damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.engine.conftest import TinyModel
from tests.engine.driver import Driver, greedy, make_engine, request
from torch import Tensor

from tandem.core.errors import ModelLoadError


@pytest.fixture
def directory(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy of a model that a test may damage."""
    return Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "model"))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


def shard(directory: Path) -> list[Path]:
    """Save the model again in several files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


def answer(directory: Path) -> list[int]:
    engine = make_engine(directory)
    return Driver(engine, 16).run([request("a", range(30), greedy(10))])["a"]


def test_shards_are_the_same_model(directory: Path) -> None:
    expected = answer(directory)
    shard(directory)
    assert answer(directory) == expected


def test_half_precision_checkpoints_are_widened(directory: Path) -> None:
    def halve(weights: dict[str, Tensor]) -> None:
        weights.update({name: value.to(torch.bfloat16) for name, value in weights.items()})

    rewrite(directory, halve)
    halved = answer(directory)

    def widen(weights: dict[str, Tensor]) -> None:
        weights.update({name: value.float() for name, value in weights.items()})

    rewrite(directory, widen)
    assert answer(directory) == halved


def test_stored_head_of_a_tied_model_is_ignored(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model("qwen2-tied"), tmp_path / "model"))
    expected = answer(directory)
    rewrite(
        directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    )
    assert answer(directory) == expected


def test_derived_tensors_of_old_checkpoints_are_ignored(directory: Path) -> None:
    expected = answer(directory)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(directory, lambda weights: weights.update({name: torch.ones(4)}))
    assert answer(directory) == expected


@pytest.mark.parametrize("kept", [0.9, 0.01, 0.0])
def test_a_truncated_file_is_refused(directory: Path, kept: float) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors file"):
        make_engine(directory)


def test_a_truncated_shard_is_named(directory: Path) -> None:
    path = shard(directory)[1]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelLoadError, match=f"{path.name}: not a whole safetensors file"):
        make_engine(directory)


def test_a_missing_shard_is_named(directory: Path) -> None:
    path = shard(directory)[1]
    path.unlink()
    with pytest.raises(ModelLoadError, match=rf"{path.name}: missing, but named in model\."):
        make_engine(directory)


def test_an_index_without_files_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelLoadError, match="weight_map is missing or empty"):
        make_engine(directory)


def test_a_missing_tensor_is_named(directory: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite(directory, lambda weights: weights.pop(name))
    with pytest.raises(ModelLoadError, match=f"tensor {name} is missing"):
        make_engine(directory)


def test_an_unexpected_shape_is_named(directory: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(directory, lambda weights: weights.update({name: torch.zeros(32, 55)}))
    with pytest.raises(ModelLoadError, match=rf"{name} has shape \(32, 55\), .* \(32, 56\)"):
        make_engine(directory)


def test_an_unread_dtype_is_named(directory: Path) -> None:
    rewrite(
        directory, lambda w: w.update({"lm_head.weight": torch.zeros(260, 32, dtype=torch.int8)})
    )
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight is I8; supported: F32, BF16, F16"):
        make_engine(directory)


def test_tensors_without_a_place_are_refused(directory: Path) -> None:
    """A Qwen2 whose heads are normalised is not a Qwen2: it would answer wrongly."""
    name = "model.layers.0.self_attn.q_norm.weight"
    rewrite(directory, lambda weights: weights.update({name: torch.ones(8)}))
    with pytest.raises(ModelLoadError, match=f"has no place for: {name}"):
        make_engine(directory)
