"""From a model directory to weights and KV blocks on a device: all of a model, or a rank's part.

The same for every rank of a worker; what runs forward passes over it is `engine` and `parallel`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tandem.core.config import CacheConfig, ModelConfig
from tandem.engine.kv_capacity import KVCapacity, Neighbours, measure_kv_capacity
from tandem.engine.memory import give_back_freed_memory
from tandem.engine.models.compiled import CompiledModel, Keep, can_compile
from tandem.engine.models.decoder import Decoder
from tandem.engine.models.layers import Loader
from tandem.engine.packed_identity import packed_keeper
from tandem.engine.parallel.compiled import CompiledShard
from tandem.engine.parallel.group import ALONE, RankGroup
from tandem.engine.parallel.weights import ShardedWeights
from tandem.engine.spec import ModelSpec
from tandem.engine.weights import Checkpoint, Progress, WeightSource
from tandem.kvcache.storage import KVStorage
from tandem_kernels import runs_compiled_decoder
from tandem_kernels.cpu import prefer_huge_pages


class LoadedModel(NamedTuple):
    """What a process holds of a model."""

    decoder: Decoder | CompiledModel | CompiledShard
    storage: KVStorage
    kv_capacity: KVCapacity
    seconds: float
    """That loading the weights took."""


def load_model(
    model_dir: Path,
    model: ModelConfig,
    cache: CacheConfig,
    spec: ModelSpec,
    device: torch.device,
    layer_groups: tuple[tuple[int, int], ...] = (),
    *,
    progress: Progress | None = None,
    weights: WeightSource | None = None,
    neighbours: Neighbours | None = None,
    ranks: RankGroup = ALONE,
) -> LoadedModel:
    """Load the weights, from the directory's files if no other source is given, and make the KV
    blocks; every rank of a worker has as many. Raises `ModelLoadError`, `ConfigError`."""
    started = time.monotonic()
    if weights is not None:
        decoder = _load_decoder(weights, spec, device, layer_groups, ranks)
    else:
        with closing(Checkpoint(model_dir, progress)) as files:
            keep = partial(packed_keeper, model_dir, model, spec, files.num_elements)
            decoder = _load_decoder(files, spec, device, layer_groups, ranks, keep)
    give_back_freed_memory()
    seconds = time.monotonic() - started
    held = replace(spec, num_kv_heads=ranks.shard.config(spec.decoder).num_kv_heads)
    capacity = measure_kv_capacity(cache, held, device, neighbours or Neighbours())
    capacity = replace(capacity, num_blocks=ranks.smallest(capacity.num_blocks))
    storage = _make_storage(held, capacity.num_blocks, cache.block_size, device)
    if not isinstance(decoder, Decoder):
        prefer_huge_pages(storage.memory)
    return LoadedModel(decoder, storage, capacity, seconds)


def _load_decoder(
    weights: WeightSource,
    spec: ModelSpec,
    device: torch.device,
    layer_groups: tuple[tuple[int, int], ...],
    ranks: RankGroup,
    keep: Callable[[], Keep | None] = lambda: None,
) -> Decoder | CompiledModel | CompiledShard:
    """Load the decoder, or this rank's part, in the form that the kernels of its device want.

    `keep` makes what keeps packed weights; a rank's are not kept.
    """
    shard = ranks.shard
    if shard.size > 1:
        weights = ShardedWeights(weights, shard, spec.decoder)
    loader, config = Loader(weights, spec.torch_dtype, device), shard.config(spec.decoder)
    if not runs_compiled_decoder(device) or not can_compile(config, loader.dtype):
        return Decoder.load(loader, config, ranks)
    if shard.size > 1:
        return CompiledShard.load(loader, config, ranks)
    group_ends = [first + count - 1 for first, count in layer_groups]
    return CompiledModel.load(loader, config, group_ends, keep())


def _make_storage(
    held: ModelSpec, num_blocks: int, block_size: int, device: torch.device
) -> KVStorage:
    """Make KV blocks for the heads that are held here."""
    return KVStorage(
        num_layers=held.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=held.num_kv_heads,
        head_dim=held.head_dim,
        dtype=held.torch_dtype,
        device=device,
    )
