"""What is read from a model directory, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine.conftest import TinyModel

from tandem.core.config import ModelConfig
from tandem.core.errors import ConfigError, ModelLoadError
from tandem.engine import ModelSpec, load_spec

MODEL = ModelConfig()


@pytest.fixture
def directory(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A copy of a model that a test may damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({name: value for name, value in content.items() if value is not None})
    )


def spec_of(directory: Path, model: ModelConfig = MODEL, device: str = "cpu") -> ModelSpec:
    return load_spec(directory, model, device)


def test_the_fields_of_a_model(tiny_model: TinyModel) -> None:
    spec = spec_of(tiny_model("qwen3"), ModelConfig(path="some/where", served_name="tiny"))
    assert (spec.name, spec.architecture) == ("tiny", "Qwen3ForCausalLM")
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size) == (3, 32, 260)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 20)
    assert (spec.max_model_len, spec.sliding_window) == (1024, None)
    assert (spec.dtype, spec.torch_dtype) == ("float32", torch.float32)


def test_windows_by_layer(tiny_model: TinyModel) -> None:
    assert spec_of(tiny_model("mistral-window")).decoder.windows == (12, 12, 12)
    qwen2 = spec_of(tiny_model("qwen2-window"))
    assert qwen2.decoder.windows == (None, 12, 12)
    assert qwen2.sliding_window == 12
    assert spec_of(tiny_model("qwen2")).decoder.windows == (None,) * 3


def test_windows_without_layer_types(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Older files say only from which layer on."""
    directory = Path(shutil.copytree(tiny_model("qwen2-window"), tmp_path / "model"))
    edit(directory / "config.json", layer_types=None)
    assert spec_of(directory).decoder.windows == (None, 12, 12)
    edit(directory / "config.json", use_sliding_window=False)
    assert spec_of(directory).decoder.windows == (None,) * 3


def test_rope_as_older_files_write_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model("llama3-rope"), tmp_path / "model"))
    expected = spec_of(directory).decoder.rope
    assert expected.rope_type == "llama3"
    config = json.loads((directory / "config.json").read_text())
    rope = config["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit(directory / "config.json", rope_parameters=None, rope_theta=theta, rope_scaling=rope)
    assert spec_of(directory).decoder.rope == expected
    rope["type"] = rope.pop("rope_type")
    edit(directory / "config.json", rope_scaling=rope)
    assert spec_of(directory).decoder.rope == expected


def test_linear_scaling_lengthens_the_context(tiny_model: TinyModel) -> None:
    assert spec_of(tiny_model("llama-linear-rope")).max_model_len == 2048


def test_end_of_sequence_ids(directory: Path) -> None:
    assert spec_of(directory).eos_token_ids == (257, 259)
    edit(directory / "generation_config.json", eos_token_id=[259, 260, -1])
    assert spec_of(directory).eos_token_ids == (259,)
    (directory / "generation_config.json").unlink()
    assert spec_of(directory).eos_token_ids == (257,)
    edit(directory / "config.json", eos_token_id=None)
    assert spec_of(directory).eos_token_ids == ()
    edit(directory / "config.json", eos_token_id="</s>")
    with pytest.raises(ModelLoadError, match="eos_token_id is '</s>'"):
        spec_of(directory)


def test_generation_defaults(directory: Path) -> None:
    edit(directory / "generation_config.json", temperature=0.6, top_k=20, transformers_version="x")
    assert dict(spec_of(directory).generation_defaults) == {"temperature": 0.6, "top_k": 20}


def test_max_model_len(directory: Path) -> None:
    assert spec_of(directory, ModelConfig(max_model_len=100)).max_model_len == 100
    with pytest.raises(ConfigError, match=r"max_model_len is 1025; allowed: .* to 1024"):
        spec_of(directory, ModelConfig(max_model_len=1025))


def test_dtype_is_the_checkpoints_own_off_the_cpu(directory: Path) -> None:
    edit(directory / "config.json", dtype="bfloat16")
    assert spec_of(directory).dtype == "float32"
    assert spec_of(directory, device="cuda").dtype == "bfloat16"
    assert spec_of(directory, ModelConfig(dtype="float16"), "cuda").dtype == "float16"
    edit(directory / "config.json", dtype=None, torch_dtype="float16")
    assert spec_of(directory, device="cuda").dtype == "float16"
    edit(directory / "config.json", torch_dtype="float8")
    with pytest.raises(ModelLoadError, match="dtype is 'float8'; supported: float32, bfloat16"):
        spec_of(directory, device="cuda")


def test_revision_tells_models_apart(directory: Path) -> None:
    original = spec_of(directory).revision
    assert spec_of(directory).revision == original
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][5] += 1
    save_file(weights, directory / "model.safetensors")
    changed = spec_of(directory).revision
    edit(directory / "config.json", rms_norm_eps=1e-3)
    assert len({original, changed, spec_of(directory).revision}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'; supported: LlamaForCausalLM,"),
        ({"architectures": None}, "architectures is missing; supported: LlamaForCausalLM"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'; supported: a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; supported: a divisor of 4"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"attention_bias": 1}, "attention_bias is 1; supported: true or false"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; supported: a positive number"),
        ({"head_dim": 9}, "head_dim is 9; supported: an even number"),
        ({"quantization_config": {"bits": 4}}, "quantized checkpoints are not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": "linear"}, "rope_parameters is 'linear'; supported: an object"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor is 0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_run_is_named(
    directory: Path, changes: dict[str, Any], message: str
) -> None:
    edit(directory / "config.json", **changes)
    with pytest.raises(ModelLoadError) as error:
        spec_of(directory)
    assert message in str(error.value)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ModelLoadError, match=name):
        spec_of(directory)


def test_a_damaged_config_is_named(directory: Path) -> None:
    (directory / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelLoadError, match=r"config\.json: not a readable JSON file"):
        spec_of(directory)
