"""What a model directory holds, without reading its weights: shape, dtype, limits, revision.

Two workers whose specs agree in all fields make the same KV from the same tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tandem.core.config import ModelConfig
from tandem.core.errors import ConfigError, ModelLoadError
from tandem.engine.models.config import DecoderConfig, HFConfig
from tandem.engine.models.registry import read_decoder
from tandem.engine.weights import find_weight_files
from tandem.modelfiles import read_json, served_name

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
_GENERATION_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "do_sample",
)
_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class ModelSpec:
    """A model as it is served."""

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    sliding_window: int | None
    """The window of the layers that have one."""
    dtype: str
    """float32, bfloat16 or float16: of weights, activations and KV; `auto` has been resolved."""
    revision: str
    """Digest of the configuration and of the weight files."""
    eos_token_ids: tuple[int, ...]
    generation_defaults: Mapping[str, Any]
    """What the model's `generation_config.json` says about sampling."""
    decoder: DecoderConfig = field(repr=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def load_spec(model_dir: Path, model: ModelConfig, device: str = "cpu") -> ModelSpec:
    """Describe the model in a directory.

    Raises `ModelLoadError` naming the file or architecture that cannot be used, and `ConfigError`
    if `max_model_len` is more than the model has.
    """
    config = read_json(model_dir, "config.json")
    hf = HFConfig(config, str(model_dir / "config.json"))
    architecture, decoder = read_decoder(hf)
    generation = read_json(model_dir, "generation_config.json", required=False)
    windows = [window for window in decoder.windows if window is not None]
    return ModelSpec(
        name=served_name(model.path, model.served_name),
        architecture=architecture,
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        vocab_size=decoder.vocab_size,
        max_model_len=_max_model_len(decoder, model),
        sliding_window=min(windows, default=None),
        dtype=_dtype(hf, model, device),
        revision=_revision(model_dir),
        eos_token_ids=_eos_token_ids(config, generation, decoder.vocab_size),
        generation_defaults=MappingProxyType(
            {
                name: generation[name]
                for name in _GENERATION_FIELDS
                if generation.get(name) is not None
            }
        ),
        decoder=decoder,
    )


def _max_model_len(decoder: DecoderConfig, model: ModelConfig) -> int:
    own = decoder.max_position_embeddings
    if decoder.rope.rope_type == "linear":  # such checkpoints state the length before scaling
        own = math.floor(own * decoder.rope.factor)
    if model.max_model_len > own:
        raise ConfigError(
            f"model.max_model_len is {model.max_model_len}; allowed: 0 (the model's own) to {own}"
        )
    return model.max_model_len or own


def _dtype(hf: HFConfig, model: ModelConfig, device: str) -> str:
    """Resolve `auto`: float32 on CPU, elsewhere what the checkpoint says."""
    if model.dtype != "auto":
        return model.dtype
    if torch.device(device).type == "cpu":
        return "float32"
    stored = hf.values.get("dtype") or hf.values.get("torch_dtype") or "float32"
    if stored not in DTYPES:
        raise hf.error("dtype", stored, ", ".join(DTYPES))
    return str(stored)


def _eos_token_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """What `generation_config.json` says goes before `config.json`, as in `transformers`.

    Ids outside the vocabulary, which some files name, can never be drawn and are left out.
    """
    stated = generation.get("eos_token_id")
    if stated is None:
        stated = config.get("eos_token_id")
    ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ModelLoadError(f"eos_token_id is {stated!r}; supported: a token id or a list of them")
    return tuple(token_id for token_id in dict.fromkeys(ids) if 0 <= token_id < vocab_size)


def _revision(model_dir: Path) -> str:
    """Digest config.json, and of each weight file its size, its header and bytes spread over it.

    Hashing every byte of a large checkpoint would take minutes; weights that differ at all differ
    nearly everywhere, so the samples tell them apart.
    """
    digest = hashlib.blake2b((model_dir / "config.json").read_bytes(), digest_size=16)
    for path in find_weight_files(model_dir):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            for sample in range(_SAMPLES):
                file.seek(max(0, (size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1)))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
