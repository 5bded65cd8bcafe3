"""What one decoder looks like, in our own words, and how to read it from a `config.json`.

Holds no tensors. Architecture files turn a Hugging Face configuration into a `DecoderConfig`;
everything after that reads only the `DecoderConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem.core.errors import ModelLoadError

RopeType = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base frequencies and how they are stretched to a longer context."""

    theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A pre-norm decoder with rotary attention and a gated feed-forward block."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tied_embeddings: bool
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """Per layer: how many positions back a token sees, itself included; None for all."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.windows)


class HFConfig:
    """A parsed `config.json` whose fields are checked as they are read."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a positive integer field."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number field."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a true / false field."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def optional_integer(self, name: str) -> int | None:
        """Return a positive integer field, or None where it is absent or null."""
        return None if self.values.get(name) is None else self.integer(name)

    def section(self, name: str) -> HFConfig:
        """Return a nested object ({} where it is absent or null)."""
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        return HFConfig(value, f"{self.source}: {name}")

    def require(self, name: str, default: object, *allowed: object) -> None:
        """Refuse the model unless the field has one of the values that we can run."""
        value = self.values.get(name, default)
        if value not in allowed:
            raise self.error(name, value, " or ".join(map(repr, allowed)))

    def error(self, name: str, value: object, allowed: str) -> ModelLoadError:
        """Return an error that names the file, the field, its value and what is supported."""
        found = "is missing" if value is None else f"is {value!r}"
        return ModelLoadError(f"{self.source}: {name} {found}; supported: {allowed}")

    def _get(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def read_common(hf: HFConfig) -> DecoderConfig:
    """Return what all supported architectures say in the same fields, with full attention
    everywhere."""
    hf.require("hidden_act", "silu", "silu", "swish")
    if hf.values.get("quantization_config"):
        raise ModelLoadError(f"{hf.source}: quantized checkpoints are not supported")
    hidden_size = hf.integer("hidden_size")
    num_heads = hf.integer("num_attention_heads")
    num_kv_heads = hf.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise hf.error("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} heads")
    head_dim = hf.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise hf.error("head_dim", head_dim, "an even number")
    return DecoderConfig(
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
        max_position_embeddings=hf.integer("max_position_embeddings"),
        tied_embeddings=hf.flag("tie_word_embeddings", False),
        rope=_read_rope(hf),
        windows=(None,) * hf.integer("num_hidden_layers"),
    )


def layer_windows(hf: HFConfig, window: int | None, first_windowed: int) -> tuple[int | None, ...]:
    """Return each layer's window: by `layer_types` where the file has them, else from a layer
    on."""
    num_layers = hf.integer("num_hidden_layers")
    types = hf.values.get("layer_types")
    if types is None:
        return tuple(window if layer >= first_windowed else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= set(known):
        raise hf.error("layer_types", types, f"{num_layers} of {' or '.join(known)}")
    return tuple(known[kind] for kind in types)


def _read_rope(hf: HFConfig) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    rope = hf.section("rope_parameters")
    if not rope.values:
        rope = hf.section("rope_scaling")
    theta = rope.number("rope_theta", hf.number("rope_theta", 10000.0))
    partial = rope.number("partial_rotary_factor", hf.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise rope.error("partial_rotary_factor", partial, "1.0")
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, rope_type="linear", factor=rope.number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            rope_type="llama3",
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        )
    raise rope.error("rope_type", kind, "default, linear or llama3")
