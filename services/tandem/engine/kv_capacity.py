"""How many KV blocks a worker gets: as configured, or from the memory that is free.

Measured once, after the weights are loaded and before the blocks are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import structlog
import torch

from tandem.core.config import CacheConfig
from tandem.core.errors import ConfigError
from tandem.engine.memory import available_memory, readable
from tandem.engine.spec import ModelSpec
from tandem.kvcache.storage import bytes_per_block

log = structlog.get_logger(__name__)

_FRACTIONS = {"cuda": 0.85, "cpu": 0.5}
"""Of free memory. The rest of a GPU is for activations and graphs; a CPU's belongs to others."""


class Neighbours(NamedTuple):
    """What a worker needs to know of its surroundings to take a fair share."""

    workers: int = 1
    """Workers that share the memory, this one included."""
    max_sequences: int = 128
    """Sequences that hold blocks at once: no more memory than they can fill is taken."""


@dataclass(frozen=True)
class KVCapacity:
    """The blocks of one worker. As text: one line for people."""

    num_blocks: int
    block_size: int
    block_bytes: int
    source: str
    """What the number was derived from."""

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def __str__(self) -> str:
        size = readable(self.num_blocks * self.block_bytes)
        return (
            f"{self.num_blocks} blocks of {self.block_size} tokens = "
            f"{self.num_tokens} tokens, {size}: {self.source}"
        )


def measure_kv_capacity(
    cache: CacheConfig, spec: ModelSpec, device: torch.device, neighbours: Neighbours
) -> KVCapacity:
    """Return the blocks that the configuration, or free memory, gives.

    Raises `ConfigError` if that is not one block. Warns if it is less than the model's context.
    """
    block_bytes = bytes_per_block(
        *(spec.num_layers, cache.block_size, spec.num_kv_heads, spec.head_dim),
        *(spec.torch_dtype, device),
    )
    if cache.num_blocks:
        number, source = cache.num_blocks, "cache.num_blocks"
    elif cache.memory_bytes:
        number, source = cache.memory_bytes // block_bytes, "cache.memory_bytes"
    else:
        number, source = _from_free_memory(cache, spec, device, neighbours, block_bytes)
    capacity = KVCapacity(number, cache.block_size, block_bytes, source)
    if number < 1:
        allowed = f"at least {block_bytes}, one block of this model"
        if cache.memory_bytes:
            raise ConfigError(f"cache.memory_bytes is {cache.memory_bytes}; allowed: {allowed}")
        raise ConfigError(f"no memory is left for KV ({source}); needed: {allowed}")
    if capacity.num_tokens < spec.max_model_len:
        log.warning(
            "KV does not hold a whole context: longer requests are refused; give it more memory "
            "or set model.max_model_len",
            max_model_len=spec.max_model_len,
            kv_cache=str(capacity),
        )
    return capacity


def _from_free_memory(
    cache: CacheConfig,
    spec: ModelSpec,
    device: torch.device,
    neighbours: Neighbours,
    block_bytes: int,
) -> tuple[int, str]:
    """An even share of a fraction of what is free, but no more than the sequences can fill."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = available_memory()
    fraction = cache.memory_fraction or _FRACTIONS[device.type]
    share = int(free * fraction) // neighbours.workers
    source = f"{fraction:.0%} of {readable(free)} free"
    if neighbours.workers > 1:
        source += f", shared by {neighbours.workers} workers"
    blocks_of_context = -(-spec.max_model_len // cache.block_size)
    most = blocks_of_context * neighbours.max_sequences
    if share // block_bytes > most:
        return most, f"{neighbours.max_sequences} sequences of full length; fewer than {source}"
    return share // block_bytes, source
