"""Qwen2 and Qwen2.5: biases on query, key and value; a window on the upper layers, if it is
switched on."""

from __future__ import annotations

from dataclasses import replace

from tandem.engine.models.config import DecoderConfig, HFConfig, layer_windows, read_common


def read_qwen2(hf: HFConfig) -> DecoderConfig:
    """Read the configuration; the biases are no field of it."""
    return replace(read_common(hf), qkv_bias=True, windows=read_windows(hf))


def read_windows(hf: HFConfig) -> tuple[int | None, ...]:
    """The layers from `max_window_layers` on have the window when `use_sliding_window` is true."""
    window = hf.optional_integer("sliding_window") if hf.flag("use_sliding_window", False) else None
    first_windowed = hf.values.get("max_window_layers", 28)
    if not isinstance(first_windowed, int) or first_windowed < 0:
        raise hf.error("max_window_layers", first_windowed, "a number of layers")
    return layer_windows(hf, window, first_windowed)
