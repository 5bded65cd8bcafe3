"""Decode iterations of fixed sizes, captured once as CUDA graphs and replayed.

A decode iteration of a large model is some hundreds of short kernels; launching them one by one
takes longer than they run. A graph holds addresses, so everything that changes from one iteration
to the next lies in the buffers of a `StaticDecodeBatch`. A batch is padded up to the next size.
Prompt chunks and everything else of changing shape stay outside. Needs the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tandem.core.sequence import ScheduledChunk
from tandem.engine.models.decoder import Decoder
from tandem.kvcache.storage import KVStorage
from tandem_kernels.triton.static_batch import StaticDecodeBatch

Replay = Callable[[], Tensor]


class DecodeGraphs:
    """Made once, while nothing else runs on the device."""

    def __init__(
        self,
        decoder: Decoder,
        storage: KVStorage,
        max_model_len: int,
        sizes: Sequence[int],
    ) -> None:
        self._decoder = decoder
        self._storage = storage
        capacity = storage.num_blocks * storage.block_size
        self._batch = StaticDecodeBatch(
            max(sizes), min(max_model_len, capacity), storage.block_size, storage.device
        )
        self._replays = self._capture_all(sorted(sizes))

    def takes(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Whether an iteration is one that was captured: single tokens, each followed by a draw."""
        return len(chunks) <= self._batch.max_rows and all(
            chunk.length == 1
            and chunk.samples
            and chunk.end <= self._batch.max_tokens
            and (
                chunk.sequence.request.sampling.prompt_logprobs is None
                or chunk.end >= chunk.sequence.request.prompt_len
            )
            for chunk in chunks
        )

    def run(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Return float32 logits, [chunks, vocab_size], valid until the next call."""
        return self.prepare(chunks)()[: len(chunks)]

    def prepare(self, chunks: Sequence[ScheduledChunk]) -> Replay:
        """Lay the iteration out and return what computes its logits, padding included."""
        self._batch.fill(
            [chunk.sequence.token_ids[chunk.start] for chunk in chunks],
            [chunk.start for chunk in chunks],
            [chunk.sequence.block_table for chunk in chunks],
        )
        size = next(size for size in self._replays if size >= len(chunks))
        return self._replays[size]

    def _forward(self, rows: int) -> Tensor:
        batch = self._batch.ragged(rows)
        hidden = self._decoder.forward(
            self._batch.token_ids(rows), batch, self._storage, None, None
        )
        return self._decoder.logits(hidden)

    def _capture_all(self, sizes: Sequence[int]) -> dict[int, Replay]:
        """Sizes in rising order; the largest is captured first, so that all share its memory."""
        if self._storage.device.type != "cuda":  # nothing to capture: run it each time
            return {size: lambda size=size: self._forward(size) for size in sizes}  # type: ignore[misc]
        pool = torch.cuda.graph_pool_handle()
        replays = {size: self._capture(size, pool) for size in reversed(sizes)}
        return {size: replays[size] for size in sizes}

    def _capture(self, size: int, pool: Any) -> Replay:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(size)  # compiles kernels and makes handles, which capture forbids
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._forward(size)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
