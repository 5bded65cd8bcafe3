"""The inverse frequencies of the rotary embedding, as a model's configuration defines them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tandem.engine.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return float32 [head_dim / 2]: radians per position of each rotated pair."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: slow pairs are stretched by `factor`, fast ones kept, those between interpolated.

    Source: "The Llama 3 Herd of Models" (2024) and the reference code that was released with it.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / rope.factor * (1.0 - kept)
