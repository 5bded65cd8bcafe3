"""The decoder that all architectures share: embedding, layers, final norm, output projection.

Computes; keeps no state between iterations beyond its weights. The KV it writes and reads belongs
to the `KVStorage` that it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from tandem.engine.models.config import DecoderConfig
from tandem.engine.models.layers import Attention, FeedForward, Iteration, Linear, Loader, OnWritten
from tandem.engine.models.rope import inverse_frequencies
from tandem.engine.parallel.group import ALONE, RankGroup, own_rows
from tandem.kvcache.storage import KVStorage
from tandem_kernels import (
    REFERENCE_CHOICE,
    Choice,
    RaggedBatch,
    add_rms_norm,
    rms_norm,
    rotary_tables,
    sample_tokens,
)


@dataclass(frozen=True)
class Layer:
    """One block: attention and feed-forward, each after a norm and beside a residual."""

    attention_norm: Tensor
    attention: Attention
    feed_forward_norm: Tensor
    feed_forward: FeedForward

    @classmethod
    def load(cls, loader: Loader, index: int, config: DecoderConfig) -> Layer:
        """Read layer `index`."""
        prefix, hidden = f"model.layers.{index}", config.hidden_size
        return cls(
            attention_norm=loader.tensor(f"{prefix}.input_layernorm.weight", hidden),
            attention=Attention.load(loader, f"{prefix}.self_attn", config, config.windows[index]),
            feed_forward_norm=loader.tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
            feed_forward=FeedForward.load(loader, f"{prefix}.mlp", config),
        )


@dataclass(frozen=True)
class Decoder:
    """A model's weights, ready to run."""

    config: DecoderConfig
    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Linear
    inverse_frequencies: Tensor
    ranks: RankGroup
    """Who else computes a part of this model."""

    @classmethod
    def load(cls, loader: Loader, config: DecoderConfig, ranks: RankGroup = ALONE) -> Decoder:
        """Read every tensor; raise `ModelLoadError` if the checkpoint does not fit the
        configuration."""
        shape = (config.vocab_size, config.hidden_size)
        embedding = loader.tensor("model.embed_tokens.weight", *shape)
        head = embedding if config.tied_embeddings else loader.tensor("lm_head.weight", *shape)
        layers = tuple(Layer.load(loader, index, config) for index in range(config.num_layers))
        final_norm = loader.tensor("model.norm.weight", config.hidden_size)
        loader.checkpoint.check_all_read(
            ignored=["lm_head.weight"] if config.tied_embeddings else []
        )
        return cls(
            config=config,
            embedding=embedding,
            layers=layers,
            final_norm=final_norm,
            head=Linear(head, None),
            inverse_frequencies=inverse_frequencies(config.rope, config.head_dim).to(loader.device),
            ranks=ranks,
        )

    def forward(
        self,
        token_ids: Tensor,
        batch: RaggedBatch,
        storage: KVStorage,
        wanted_rows: Tensor | None,
        on_written: OnWritten | None,
    ) -> Tensor:
        """Compute the tokens' KV and return the final hidden states of the wanted rows.

        token_ids: int64 [tokens]; wanted_rows: int64 [rows], None for all. The last layer does
        nothing for the other rows once their KV is written. Result: [rows, hidden_size].
        """
        x = self._embed(token_ids)
        cos, sin = rotary_tables(batch.positions, self.inverse_frequencies, x.dtype)
        iteration = Iteration(batch, cos, sin)
        eps, last = self.config.rms_norm_eps, len(self.layers) - 1
        residual, normed = x, rms_norm(x, self.layers[0].attention_norm, eps)
        for index, layer in enumerate(self.layers):
            cache = storage.layer(index)
            query = layer.attention.write(normed, iteration, cache)
            if on_written is not None:
                on_written(index)
            if index == last and wanted_rows is not None and wanted_rows.numel() == 0:
                return residual[:0]
            seen = layer.attention.read(query, iteration, cache)
            if index == last and wanted_rows is not None:
                seen, residual = seen[wanted_rows], residual[wanted_rows]
            x = self.ranks.sum(layer.attention.output(seen))
            normed, residual = add_rms_norm(x, residual, layer.feed_forward_norm, eps)
            x = self.ranks.sum(layer.feed_forward(normed))
            following = self.final_norm if index == last else self.layers[index + 1].attention_norm
            normed, residual = add_rms_norm(x, residual, following, eps)
        return normed

    @property
    def choice(self) -> Choice:
        """What draws tokens from this model's logits."""
        return Choice(REFERENCE_CHOICE.argmax, sample_tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 [rows, vocab_size] for final hidden states; with several ranks, rank 0
        gets the whole vocabulary's."""
        return self.ranks.gather(self.head(hidden).float())

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Return [tokens, hidden_size]."""
        if self.ranks.shard.size == 1:
            return functional.embedding(token_ids, self.embedding)
        rows, ours = own_rows(token_ids, self.config.vocab_size, self.ranks.shard)
        return self.ranks.sum(functional.embedding(rows, self.embedding) * ours[:, None])
