"""Attention of prompt chunks by FlashInfer, where it is installed and faster than our own kernel.

Decode rows stay with our kernels: they are replayed from captured graphs, and FlashInfer plans
every batch on the host. Splitting over the context is off, so that no row depends on its batch.
Written against flashinfer-python 0.7 (`BatchPrefillWithPagedKVCacheWrapper`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from tandem_kernels.ragged_batch import RaggedBatch
from tandem_kernels.upload import upload

_PACKAGE = "flashinfer"
_WORKSPACE_BYTES = 128 * 2**20
_HEAD_DIMS = (64, 128, 256)
_MEASURED_CHUNK, _MEASURED_CONTEXT = 512, 2048
_RUNS = 5

Attend = Callable[..., None]


class PagedLayout(NamedTuple):
    """The chunks of a batch in compressed rows, int32, as FlashInfer's plan reads them."""

    rows: Tensor
    """int64: the batch's rows that belong to the chunks."""
    query_starts: Tensor
    """[chunks + 1]: first query of each, counted among `rows`."""
    block_starts: Tensor
    """[chunks + 1]: first entry of each in `blocks`."""
    blocks: Tensor
    last_block_lens: Tensor
    """[chunks]: tokens in each one's last block, from 1 on."""


def paged_layout(batch: RaggedBatch, chunks: Sequence[int]) -> PagedLayout:
    """Lay out some sequences of a batch; on its device."""
    device, size = batch.block_tables.device, batch.block_size
    spans = list(pairwise(batch.query_starts))
    lens = np.array([spans[i][1] - spans[i][0] for i in chunks], dtype=np.int32)
    contexts = np.array([batch.context_lens[i] for i in chunks], dtype=np.int32)
    counts = -(-contexts // size)
    rows = np.concatenate([np.arange(*spans[i]) for i in chunks])
    cells = np.concatenate([np.arange(count) for count in counts])
    tables = np.repeat(np.asarray(chunks), counts)
    index = upload(np.stack((tables, cells)).astype(np.int64), device)
    return PagedLayout(
        rows=upload(rows.astype(np.int64), device),
        query_starts=upload(_starts(lens), device),
        block_starts=upload(_starts(counts), device),
        blocks=batch.block_tables[index[0], index[1]].to(torch.int32),
        last_block_lens=upload(contexts - (counts - 1) * size, device),
    )


def attend_chunks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: RaggedBatch,
    chunks: Sequence[int],
    output: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Fill the rows of `output` that belong to the sequences `chunks`. See `paged_attention`."""
    key = (_PACKAGE, window, scale)
    if key not in batch.derived:
        layout = paged_layout(batch, chunks)
        batch.derived[key] = layout, _planned(layout, query, key_cache, scale, window)
    layout, wrapper = cast(tuple[PagedLayout, Any], batch.derived[key])
    whole = len(layout.rows) == len(query)
    queries = query.contiguous() if whole else query[layout.rows]
    attended = wrapper.run(queries, (key_cache, value_cache))
    if whole:
        output.copy_(attended)
    else:
        output[layout.rows] = attended


def is_candidate(query: Tensor) -> bool:
    """Whether FlashInfer is installed and knows queries of this kind."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] in _HEAD_DIMS
        and find_spec(_PACKAGE) is not None
    )


def describe() -> str:
    """What runs, for people to read."""
    return f"FlashInfer {version('flashinfer-python')} for prompts"


def is_faster(query: Tensor, key_cache: Tensor, ours: Attend) -> bool:
    """Measure both on one chunk of a prompt, on queries and KV of the given shape and type.

    Not within a graph capture. `ours` has the signature of `attend_chunks`.
    """
    num_blocks, size = key_cache.shape[:2]
    context = min(_MEASURED_CONTEXT, num_blocks * size)
    chunk = min(_MEASURED_CHUNK, context)
    table = list(range(-(-context // size)))
    queries = torch.zeros((chunk, *query.shape[1:]), dtype=query.dtype, device=query.device)
    output, scale = torch.empty_like(queries), query.shape[2] ** -0.5
    batch = RaggedBatch.build([table], [context - chunk], [chunk], size, query.device)

    def milliseconds(attend: Any) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for run in range(_RUNS + 1):
            if run == 1:  # the first one compiles
                start.record()
            attend(queries, key_cache, key_cache, batch, [0], output, scale, None)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return milliseconds(attend_chunks) < milliseconds(ours)


def _planned(
    layout: PagedLayout, query: Tensor, key_cache: Tensor, scale: float, window: int | None
) -> Any:
    wrapper, planned = _free_wrapper(query.device, window)
    wrapper.plan(
        layout.query_starts,
        layout.block_starts,
        layout.blocks,
        layout.last_block_lens,
        num_qo_heads=query.shape[1],
        num_kv_heads=key_cache.shape[2],
        head_dim_qk=query.shape[2],
        page_size=key_cache.shape[1],
        causal=True,
        sm_scale=scale,
        window_left=-1 if window is None else window - 1,
        q_data_type=query.dtype,
        kv_data_type=key_cache.dtype,
        disable_split_kv=True,
    )
    planned.record(torch.cuda.current_stream(query.device))
    return wrapper


def _free_wrapper(device: torch.device, window: int | None) -> tuple[Any, torch.cuda.Event]:
    """A wrapper whose last plan has left the host memory that it is copied from."""
    wrappers = _wrappers(device, window)
    for wrapper, planned in wrappers:
        if planned.query():  # type: ignore[no-untyped-call]
            return wrapper, planned
    make = import_module(_PACKAGE).BatchPrefillWithPagedKVCacheWrapper
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    wrappers.append((make(_workspace(device), "NHD"), event))
    return wrappers[-1]


@cache
def _wrappers(device: torch.device, window: int | None) -> list[tuple[Any, torch.cuda.Event]]:
    return []


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _starts(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
