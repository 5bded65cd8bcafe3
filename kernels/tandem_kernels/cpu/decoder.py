"""A whole decoder for the library: a forward pass is one call per group of layers.

Holds the packed weights and the structs that point to them. KV and batches belong to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tandem_kernels.choice import Choice
from tandem_kernels.cpu.context import Context, address, cache_struct, check, dtype_code
from tandem_kernels.cpu.library import LayerStruct, ModelStruct
from tandem_kernels.cpu.operations import BatchView, argmax, linear, sample_tokens
from tandem_kernels.cpu.packing import PackedLinear
from tandem_kernels.ragged_batch import RaggedBatch


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """The weights of one layer."""

    attention_norm: Tensor
    feed_forward_norm: Tensor
    head_norm: Tensor | None
    """[heads + kv_heads, head_dim], or None."""
    qkv: PackedLinear
    output: PackedLinear
    gate_up: PackedLinear
    """From `pack_gate_up`."""
    down: PackedLinear
    window: int | None


@dataclass(frozen=True, eq=False)
class PackedModel:
    """The weights of a decoder. All in one dtype, float32 or bfloat16."""

    layers: Sequence[PackedLayer]
    embedding: PackedLinear
    final_norm: Tensor
    head: PackedLinear
    inverse_frequencies: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    inner: int
    eps: float


class CompiledDecoder:
    """Runs a `PackedModel`. Used by one thread at a time, as its context is."""

    def __init__(self, context: Context, model: PackedModel) -> None:
        self.context = context
        self._model = model
        self._dtype = model.embedding.panels.dtype
        self._layers = (LayerStruct * len(model.layers))(*map(_layer_struct, model.layers))
        self._struct = ModelStruct(
            dtype=dtype_code(self._dtype),
            num_layers=len(model.layers),
            hidden=model.embedding.inputs,
            inner=model.inner,
            heads=model.num_heads,
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            eps=model.eps,
            layers=self._layers,
            final_norm=address(model.final_norm, self._dtype),
            embedding=model.embedding.struct,
            inverse_frequencies=address(model.inverse_frequencies, torch.float32),
        )

    def forward(
        self,
        token_ids: Tensor,
        batch: RaggedBatch,
        kv: Tensor,
        wanted_rows: Tensor | None,
        on_written: Callable[[int], None] | None = None,
        stops: Sequence[int] = (),
    ) -> Tensor:
        """Compute the tokens' KV and return the final hidden states of the wanted rows.

        token_ids: int64 [tokens]; kv: [layers, 2, blocks, block_size, kv_heads, head_dim], of any
        strides that `cache_struct` allows; wanted_rows: int64 [rows], None for all. `stops` are
        layers after which `on_written` is called with the layer's number: its KV and that of all
        before it is in place.
        """
        vocab = self._model.embedding.outputs
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab:
            raise IndexError(f"a token id is outside of the vocabulary of {vocab}")
        rows = batch.num_tokens if wanted_rows is None else len(wanted_rows)
        num_wanted = -1 if wanted_rows is None else rows
        hidden = torch.empty((rows, self._model.embedding.inputs), dtype=self._dtype)
        view = BatchView(batch)
        cache = cache_struct(kv, self._dtype)
        last = len(self._model.layers) - 1
        first = 0
        for stop in sorted({*stops, last} if on_written is not None else {last}):
            status = self.context.library.tandem_forward(
                *(self.context.handle, self._struct, view.struct, cache),
                *(address(token_ids, torch.int64), first, stop + 1 - first),
                *(address(wanted_rows, torch.int64), num_wanted, address(hidden)),
            )
            check(status)
            first = stop + 1
            if on_written is not None:
                on_written(stop)
        return hidden

    @property
    def choice(self) -> Choice:
        """The choice of tokens on this decoder's threads."""
        return Choice(partial(argmax, self.context), partial(sample_tokens, self.context))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 [rows, vocab_size] for final hidden states."""
        return linear(self.context, self._model.head, hidden)


def _layer_struct(layer: PackedLayer) -> LayerStruct:
    return LayerStruct(
        attention_norm=address(layer.attention_norm),
        feed_forward_norm=address(layer.feed_forward_norm),
        head_norm=address(layer.head_norm),
        qkv=layer.qkv.struct,
        output=layer.output.struct,
        gate_up=layer.gate_up.struct,
        down=layer.down.struct,
        window=layer.window or 0,
    )
