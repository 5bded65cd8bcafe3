"""Which part of a decoder one rank holds. Pure: numbers and names only.

Invariant: a rank's query heads read KV heads that the same rank holds. With more ranks than KV
heads, a KV head is held by several ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem.core.errors import ConfigError
from tandem.engine.models.config import DecoderConfig
from tandem.engine.weights import Part
from tandem.kvcache.heads import heads_of

_BY_OUTPUT = ("q_proj", "gate_proj", "up_proj")
_BY_KV_HEAD = ("k_proj", "v_proj")
_BY_INPUT = ("o_proj", "down_proj")
_BY_VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def config(self, whole: DecoderConfig) -> DecoderConfig:
        """The decoder as this rank computes it. The vocabulary is filled up to equal parts."""
        return replace(
            whole,
            vocab_size=-(-whole.vocab_size // self.size),
            intermediate_size=whole.intermediate_size // self.size,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
        )

    def part(self, name: str, whole: DecoderConfig) -> Part | None:
        """Where in the checkpoint's tensor this rank's part lies; None: it has all of it."""
        module, _, kind = name.rpartition(".")
        projection = module.rpartition(".")[2]
        if projection in _BY_OUTPUT:
            rows = whole.num_heads * whole.head_dim
            if projection != "q_proj":
                rows = whole.intermediate_size
            return self._equal(0, rows)
        if projection in _BY_KV_HEAD:
            first, count = heads_of(self.rank, self.size, whole.num_kv_heads)
            total = whole.num_kv_heads * whole.head_dim
            return Part(0, first * whole.head_dim, count * whole.head_dim, total)
        if projection in _BY_INPUT and kind == "weight":
            columns = whole.intermediate_size
            if projection == "o_proj":
                columns = whole.num_heads * whole.head_dim
            return self._equal(1, columns)
        if projection in _BY_VOCABULARY:
            length = -(-whole.vocab_size // self.size)
            start = min(self.rank * length, whole.vocab_size)
            return Part(0, start, min(length, whole.vocab_size - start), whole.vocab_size)
        return None

    def adds_bias(self, name: str) -> bool:
        """Whether this rank adds the bias of a projection whose results are summed: rank 0."""
        module, _, kind = name.rpartition(".")
        summed = kind == "bias" and module.rpartition(".")[2] in _BY_INPUT
        return not summed or self.rank == 0

    def _equal(self, dimension: int, total: int) -> Part:
        length = total // self.size
        return Part(dimension, self.rank * length, length, total)


def allowed_degrees(config: DecoderConfig) -> tuple[int, ...]:
    """How many ranks a decoder can be divided over."""
    return tuple(
        size for size in range(1, config.num_heads + 1) if not _cannot_divide(config, size)
    )


def check_degree(field: str, config: DecoderConfig, size: int) -> None:
    """Raise `ConfigError` naming the field, what does not divide, and the allowed values."""
    if reason := _cannot_divide(config, size):
        allowed = ", ".join(map(str, allowed_degrees(config)))
        raise ConfigError(f"{field} is {size}; allowed for this model: {allowed} ({reason})")


def _cannot_divide(config: DecoderConfig, size: int) -> str:
    """Say what stands in the way; empty if nothing does."""
    for name, number in (("heads", config.num_heads), ("inner units", config.intermediate_size)):
        if number % size:
            return f"{number} {name} do not divide by {size}"
    kv_heads = config.num_kv_heads
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} KV heads and {size} ranks: neither divides by the other"
    return ""
