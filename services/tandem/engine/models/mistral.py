"""Mistral: the common decoder; every layer has the sliding window, where there is one."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.models.config import DecoderConfig, HFConfig, read_common


def read_mistral(hf: HFConfig) -> DecoderConfig:
    """`sliding_window` null means full attention."""
    common = read_common(hf)
    return replace(common, windows=(hf.optional_integer("sliding_window"),) * common.num_layers)
