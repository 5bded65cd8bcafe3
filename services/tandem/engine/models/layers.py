"""The parts that a decoder is composed of: projections, attention, feed-forward block.

Each part is its weights and what it does with them, and loads itself from a checkpoint under the
names that Hugging Face gives them. Projections that read the same input are fused into one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tandem.engine.models.config import DecoderConfig
from tandem.engine.weights import WeightSource
from tandem_kernels import RaggedBatch, paged_attention, rms_norm, rotary_kv_write, silu_mul


@dataclass(frozen=True)
class Loader:
    """Where weights come from and how they are to be held."""

    checkpoint: WeightSource
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Read one tensor."""
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.checkpoint.read_into(name, out)
        return out

    def linear(self, names: Sequence[str], sizes: Sequence[int], inputs: int, bias: bool) -> Linear:
        """Read projections of the same input, one under the other."""
        weight = torch.empty((sum(sizes), inputs), dtype=self.dtype, device=self.device)
        for name, part in zip(names, torch.split(weight, list(sizes)), strict=True):
            self.checkpoint.read_into(f"{name}.weight", part)
        if not bias:
            return Linear(weight, None)
        offset = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        for name, part in zip(names, torch.split(offset, list(sizes)), strict=True):
            self.checkpoint.read_into(f"{name}.bias", part)
        return Linear(weight, offset)


@dataclass(frozen=True)
class Linear:
    """weight: [outputs, inputs]; bias: [outputs] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Iteration:
    """What every layer of one forward pass reads."""

    batch: RaggedBatch
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over the KV blocks, with rotary positions."""

    qkv: Linear
    output: Linear
    head_norm: Tensor | None
    """[heads + kv_heads, head_dim]: the norm weights of every query and key head (qk-norm)."""
    eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None

    @classmethod
    def load(
        cls, loader: Loader, prefix: str, config: DecoderConfig, window: int | None
    ) -> Attention:
        """Read `self_attn` of one layer."""
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        names = [f"{prefix}.{part}_proj" for part in "qkv"]
        head_norm = None
        if config.qk_norm:
            query_norm = loader.tensor(f"{prefix}.q_norm.weight", config.head_dim)
            key_norm = loader.tensor(f"{prefix}.k_norm.weight", config.head_dim)
            head_norm = torch.stack(
                [query_norm] * config.num_heads + [key_norm] * config.num_kv_heads
            )
        return cls(
            qkv=loader.linear(names, (query, key, key), config.hidden_size, config.qkv_bias),
            output=loader.linear(
                [f"{prefix}.o_proj"], (config.hidden_size,), query, config.output_bias
            ),
            head_norm=head_norm,
            eps=config.rms_norm_eps,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=window,
        )

    def write(self, x: Tensor, iteration: Iteration, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Put the tokens' keys and values into the cache; return the queries [tokens, heads,
        head_dim]."""
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        heads, value = torch.split(
            heads, [self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1
        )
        if self.head_norm is not None:
            heads = rms_norm(heads, self.head_norm, self.eps)
        slots = iteration.batch.slots
        return rotary_kv_write(heads, value, iteration.cos, iteration.sin, *cache, slots)

    def read(self, query: Tensor, iteration: Iteration, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Return what the queries see, [tokens, heads * head_dim], before the output projection."""
        scale = self.head_dim**-0.5
        return paged_attention(query, *cache, iteration.batch, scale, self.window).flatten(1)


@dataclass(frozen=True)
class FeedForward:
    """The gated block: down(silu(gate(x)) * up(x))."""

    gate_up: Linear
    down: Linear

    @classmethod
    def load(cls, loader: Loader, prefix: str, config: DecoderConfig) -> FeedForward:
        """Read `mlp` of one layer."""
        inner, hidden, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        return cls(
            gate_up=loader.linear(names, (inner, inner), hidden, bias),
            down=loader.linear([f"{prefix}.down_proj"], (hidden,), inner, bias),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))


OnWritten = Callable[[int], None]
"""Called with a layer's number once the KV of the iteration's tokens is in its cache."""
