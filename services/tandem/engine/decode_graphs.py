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

from tandem.engine.inputs import IterationInputs
from tandem.engine.models.decoder import Decoder
from tandem.kvcache.storage import KVStorage
from tandem_kernels import RaggedBatch
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

    def takes(self, inputs: IterationInputs) -> bool:
        """Whether an iteration is one that was captured: single tokens, each followed by a draw."""
        batch = inputs.batch
        return (
            inputs.only_decodes
            and batch.num_sequences <= self._batch.max_rows
            and max(batch.context_lens) <= self._batch.max_tokens
        )

    def run(self, token_ids: Tensor, batch: RaggedBatch) -> Tensor:
        """Return float32 logits, [sequences, vocab_size], valid until the next call."""
        return self.prepare(token_ids, batch)()[: batch.num_sequences]

    def prepare(self, token_ids: Tensor, batch: RaggedBatch) -> Replay:
        """Lay the iteration out, on the device alone, and return what computes its logits, padding
        included."""
        self._batch.fill(token_ids, batch)
        return self._replays[next(size for size in self._replays if size >= len(token_ids))]

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
