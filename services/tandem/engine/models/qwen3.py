"""Qwen3 (dense): a norm on each query and key head, explicit `head_dim`, windows as in Qwen2."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.models.config import DecoderConfig, HFConfig, read_common
from tandem.engine.models.qwen2 import read_windows


def read_qwen3(hf: HFConfig) -> DecoderConfig:
    """`head_dim` is 128 where the file does not say."""
    attention_bias = hf.flag("attention_bias", False)
    return replace(
        read_common(hf),
        head_dim=hf.integer("head_dim", 128),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
        windows=read_windows(hf),
    )
