"""One rank's part of a decoder on the C++ kernels: an operation per call.

The library's whole forward pass cannot wait for other ranks in its middle, so each half of a layer
is a few calls from here, with the sum over the ranks after it. The residual and what is summed
are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.models.compiled import load_packed
from tandem.engine.models.config import DecoderConfig
from tandem.engine.models.layers import Loader, OnWritten
from tandem.engine.parallel.group import RankGroup, own_rows
from tandem.kvcache.storage import KVStorage
from tandem_kernels import Choice, RaggedBatch, cpu
from tandem_kernels.cpu import operations


@dataclass(frozen=True)
class CompiledShard:
    """A rank's packed weights, ready to run."""

    context: cpu.Context
    decoder: cpu.CompiledDecoder
    model: cpu.PackedModel
    ranks: RankGroup

    @classmethod
    def load(cls, loader: Loader, config: DecoderConfig, ranks: RankGroup) -> CompiledShard:
        """Read this rank's tensors; `config` is the rank's own. Raises `ModelLoadError` if the
        checkpoint does not fit."""
        context = cpu.Context(torch.get_num_threads())
        model = load_packed(context, loader, config)
        return cls(context, cpu.CompiledDecoder(context, model), model, ranks)

    def forward(
        self,
        token_ids: Tensor,
        batch: RaggedBatch,
        storage: KVStorage,
        wanted_rows: Tensor | None,
        on_written: OnWritten | None,
    ) -> Tensor:
        """As `Decoder.forward`."""
        residual, last = self._embed(token_ids), len(self.model.layers) - 1
        for index, layer in enumerate(self.model.layers):
            keys, values = storage.layer(index)
            query = self._write(residual, layer, batch, keys, values)
            if on_written is not None:
                on_written(index)
            wanted = wanted_rows if index == last else None
            if wanted is not None and wanted.numel() == 0:
                return residual[:0].to(storage.dtype)
            scale = self.model.head_dim**-0.5
            seen = operations.paged_attention(
                self.context, query, keys, values, batch, scale, layer.window
            ).flatten(1)
            if wanted is not None:
                seen, residual = seen[wanted], residual[wanted]
            residual = residual + self.ranks.sum(
                operations.linear(self.context, layer.output, seen)
            )
            residual = residual + self.ranks.sum(self._feed_forward(residual, layer))
        return self._norm(residual, self.model.final_norm)

    @property
    def choice(self) -> Choice:
        """What draws tokens from this model's logits."""
        return self.decoder.choice

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.logits`."""
        return self.ranks.gather(self.decoder.logits(hidden))

    def _embed(self, token_ids: Tensor) -> Tensor:
        rows, ours = own_rows(token_ids, self.model.embedding.outputs, self.ranks.shard)
        looked_up = cpu.unpack_rows(self.model.embedding, rows).float()
        return self.ranks.sum(looked_up * ours[:, None])

    def _write(
        self,
        residual: Tensor,
        layer: cpu.PackedLayer,
        batch: RaggedBatch,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Put the tokens' keys and values into the cache; return the queries [tokens, heads,
        head_dim]."""
        normed = self._norm(residual, layer.attention_norm)
        projected = operations.linear(self.context, layer.qkv, normed)
        heads = projected.view(len(normed), -1, self.model.head_dim)
        frequencies, eps = self.model.inverse_frequencies, self.model.eps
        return operations.rotary_kv_write(
            self.context, heads, keys, values, batch, frequencies, layer.head_norm, eps
        )

    def _feed_forward(self, residual: Tensor, layer: cpu.PackedLayer) -> Tensor:
        normed = self._norm(residual, layer.feed_forward_norm)
        inner = operations.silu_linear(self.context, layer.gate_up, normed)
        return operations.linear(self.context, layer.down, inner)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return operations.rms_norm(self.context, x, weight, self.model.eps)
