"""The decoder as the C++ kernels run it: the same weights, packed; one call per group of layers.

Takes the place of `decoder.Decoder` on CPUs for which the kernels were built. Each matrix is packed
as soon as it is read, so there is never a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.models.config import DecoderConfig
from tandem.engine.models.decoder import Layer
from tandem.engine.models.layers import Linear, Loader, OnWritten
from tandem.engine.models.rope import inverse_frequencies
from tandem.kvcache.storage import KVStorage
from tandem_kernels import Choice, RaggedBatch, cpu


@dataclass(frozen=True)
class CompiledModel:
    """A model's packed weights, ready to run."""

    decoder: cpu.CompiledDecoder
    group_ends: tuple[int, ...]
    """The last layer of every group of layers."""

    @classmethod
    def load(
        cls, loader: Loader, config: DecoderConfig, group_ends: Sequence[int]
    ) -> CompiledModel:
        """Read every tensor; raise `ModelLoadError` if the checkpoint does not fit the
        configuration."""
        context = cpu.Context(torch.get_num_threads())

        def matrix(name: str) -> cpu.PackedLinear:
            shape = (config.vocab_size, config.hidden_size)
            return cpu.pack_linear(context, loader.tensor(name, *shape), None)

        embedding = matrix("model.embed_tokens.weight")
        head = embedding if config.tied_embeddings else matrix("lm_head.weight")
        model = cpu.PackedModel(
            layers=[
                pack_layer(context, Layer.load(loader, index, config))
                for index in range(config.num_layers)
            ],
            embedding=embedding,
            final_norm=loader.tensor("model.norm.weight", config.hidden_size),
            head=head,
            inverse_frequencies=inverse_frequencies(config.rope, config.head_dim).contiguous(),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            eps=config.rms_norm_eps,
        )
        loader.checkpoint.check_all_read(
            ignored=["lm_head.weight"] if config.tied_embeddings else []
        )
        return cls(cpu.CompiledDecoder(context, model), tuple(group_ends))

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


def can_compile(config: DecoderConfig, dtype: torch.dtype) -> bool:
    """Whether the kernels can run this model: its dtype, and rows that split into their units."""
    attended = config.num_heads * config.head_dim
    rows = (config.hidden_size, config.intermediate_size, attended, config.head_dim)
    fits = all(cpu.can_pack(inputs, dtype) for inputs in rows)
    return cpu.is_supported(dtype) and fits and config.head_dim <= cpu.MOST_HEAD_DIM


def pack_layer(context: cpu.Context, layer: Layer) -> cpu.PackedLayer:
    """Pack the matrices of one layer."""

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
