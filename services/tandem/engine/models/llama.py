"""Llama 2, 3 and 3.1: the common decoder, with optional biases."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.models.config import DecoderConfig, HFConfig, read_common


def read_llama(hf: HFConfig) -> DecoderConfig:
    """`attention_bias` covers all four projections, `mlp_bias` all three."""
    attention_bias = hf.flag("attention_bias", False)
    return replace(
        read_common(hf),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=hf.flag("mlp_bias", False),
    )
