"""The decoder as the C++ kernels run it: the same weights, packed; one call per group of layers.

Takes the place of `decoder.Decoder` on CPUs for which the kernels were built. Each matrix is packed
as soon as it is read, several at a time, so there is never a second copy of the weights. Packed
weights may be kept for the next start (`packed_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tandem.engine.models.config import DecoderConfig
from tandem.engine.models.decoder import Layer
from tandem.engine.models.layers import Linear, Loader, OnWritten
from tandem.engine.models.rope import inverse_frequencies
from tandem.engine.packed_cache import build_all, in_parallel
from tandem.engine.packed_format import Build, Parts
from tandem.kvcache.storage import KVStorage
from tandem_kernels import Choice, RaggedBatch, cpu

Keep = Callable[[Build], Parts | None]
"""Keeps what `Build` makes, or finds it made already; None where it cannot."""


@dataclass(frozen=True)
class CompiledModel:
    """A model's packed weights, ready to run."""

    decoder: cpu.CompiledDecoder
    group_ends: tuple[int, ...]
    """The last layer of every group of layers."""

    @classmethod
    def load(
        cls,
        loader: Loader,
        config: DecoderConfig,
        group_ends: Sequence[int],
        keep: Keep | None = None,
    ) -> CompiledModel:
        """Read every tensor, or what `keep` has of them; raise `ModelLoadError` if the checkpoint
        does not fit the configuration."""
        context = cpu.Context(torch.get_num_threads())
        model = load_packed(context, loader, config, keep)
        return cls(cpu.CompiledDecoder(context, model), tuple(group_ends))

    def pin(self, cores: Sequence[int]) -> None:
        """Keep the threads on cores, if there is one for each; the first is the caller, who pins
        itself."""
        if len(cores) == self.decoder.context.threads:
            self.decoder.context.pin(cores)

    def forward(
        self,
        token_ids: Tensor,
        batch: RaggedBatch,
        storage: KVStorage,
        wanted_rows: Tensor | None,
        on_written: OnWritten | None,
    ) -> Tensor:
        """As `Decoder.forward`, but `on_written` is called once per group, with its last layer."""
        return self.decoder.forward(
            token_ids, batch, storage.kv, wanted_rows, on_written, self.group_ends
        )

    @property
    def choice(self) -> Choice:
        """What draws tokens from this model's logits."""
        return self.decoder.choice

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 [rows, vocab_size] for final hidden states."""
        return self.decoder.logits(hidden)


def load_packed(
    context: cpu.Context, loader: Loader, config: DecoderConfig, keep: Keep | None = None
) -> cpu.PackedModel:
    """Read and pack every tensor, or take what `keep` has of them. Raises `ModelLoadError`."""

    def build(add: Callable[[str, Any], None]) -> None:
        in_parallel(context.threads, _jobs(context, loader, config), add)
        loader.checkpoint.check_all_read(
            ignored=["lm_head.weight"] if config.tied_embeddings else []
        )

    parts = (keep(build) if keep is not None else None) or build_all(build)
    embedding = parts["embedding"]
    return cpu.PackedModel(
        layers=[parts[f"layers.{index}"] for index in range(config.num_layers)],
        embedding=embedding,
        final_norm=parts["final_norm"],
        head=parts.get("head", embedding),
        inverse_frequencies=inverse_frequencies(config.rope, config.head_dim).contiguous(),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        inner=config.intermediate_size,
        eps=config.rms_norm_eps,
    )


def _jobs(
    context: cpu.Context, loader: Loader, config: DecoderConfig
) -> dict[str, Callable[[], object]]:
    """What makes each part, the largest first."""

    def matrix(name: str) -> cpu.PackedLinear:
        shape = (config.vocab_size, config.hidden_size)
        return cpu.pack_linear(context, loader.tensor(name, *shape), None)

    def layer(index: int) -> cpu.PackedLayer:
        return _pack_layer(context, Layer.load(loader, index, config))

    jobs: dict[str, Callable[[], object]] = {
        "embedding": partial(matrix, "model.embed_tokens.weight")
    }
    if not config.tied_embeddings:
        jobs["head"] = partial(matrix, "lm_head.weight")
    jobs.update({f"layers.{index}": partial(layer, index) for index in range(config.num_layers)})
    jobs["final_norm"] = partial(loader.tensor, "model.norm.weight", config.hidden_size)
    return jobs


def can_compile(config: DecoderConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels can run this model: its dtype, and rows that split into their units."""
    attended = config.num_heads * config.head_dim
    rows = (config.hidden_size, config.intermediate_size, attended, config.head_dim)
    fits = all(cpu.can_pack(inputs, dtype) for inputs in rows)
    return cpu.is_supported(dtype) and fits and config.head_dim <= cpu.MOST_HEAD_DIM


def _pack_layer(context: cpu.Context, layer: Layer) -> cpu.PackedLayer:
    def packed(
        linear: Linear,
        pack: Callable[[cpu.Context, Tensor, Tensor | None], cpu.PackedLinear] = cpu.pack_linear,
    ) -> cpu.PackedLinear:
        return pack(context, linear.weight, linear.bias)

    attention, feed_forward = layer.attention, layer.feed_forward
    return cpu.PackedLayer(
        attention_norm=layer.attention_norm,
        feed_forward_norm=layer.feed_forward_norm,
        head_norm=attention.head_norm,
        qkv=packed(attention.qkv),
        output=packed(attention.output),
        gate_up=packed(feed_forward.gate_up, cpu.pack_gate_up),
        down=packed(feed_forward.down),
        window=attention.window,
    )
