"""Each kernel by itself, as a function of tensors: for tests, measurements, and the parts of an
iteration outside of the layers.

Within a forward pass the same code runs over all layers in one call (`decoder.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tandem_kernels.cpu.context import (
    Context,
    address,
    block_address,
    cache_struct,
    check,
    dtype_code,
)
from tandem_kernels.cpu.library import (
    MOST_HEAD_DIM,
    BatchStruct,
    LayerStruct,
    ModelStruct,
    load_library,
)
from tandem_kernels.cpu.packing import PackedLinear
from tandem_kernels.ragged_batch import RaggedBatch


class BatchView:
    """A `RaggedBatch` as the library reads it; keeps alive what it points to."""

    def __init__(self, batch: RaggedBatch) -> None:
        self._starts = np.array(batch.query_starts, dtype=np.int64)
        self._contexts = np.array(batch.context_lens, dtype=np.int64)
        self._batch = batch
        self.struct = BatchStruct(
            num_sequences=batch.num_sequences,
            num_tokens=batch.num_tokens,
            table_width=batch.block_tables.shape[1],
            block_size=batch.block_size,
            query_starts=self._starts.ctypes.data,
            context_lens=self._contexts.ctypes.data,
            block_tables=address(batch.block_tables, torch.int64),
            positions=address(batch.positions, torch.int64),
            slots=address(batch.slots, torch.int64),
        )


def linear(context: Context, packed: PackedLinear, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x W^T + bias as float32 [rows, outputs]. x: [rows, inputs], in the weight's dtype.
    `out`, if given, is filled and returned."""
    rows = _checked_rows(packed, x)
    if out is None:
        out = torch.empty((rows, packed.outputs), dtype=torch.float32)
    elif tuple(out.shape) != (rows, packed.outputs) or out.dtype != torch.float32:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}")
    if rows:
        check(context.library.tandem_linear(*_linear_arguments(context, packed, x, out)))
    return out


def silu_linear(context: Context, packed: PackedLinear, x: Tensor) -> Tensor:
    """Return silu(gate) * up, [rows, inner] in x's dtype, for a weight of `pack_gate_up`."""
    rows = _checked_rows(packed, x)
    out = torch.empty((rows, packed.outputs // 2), dtype=x.dtype)
    if rows:
        check(context.library.tandem_silu_linear(*_linear_arguments(context, packed, x, out)))
    return out


def rms_norm(context: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `weight * x / rms(x)` in the weight's dtype. x: float32 [rows, n]; weight: [n]."""
    out = torch.empty(x.shape, dtype=weight.dtype)
    context.library.tandem_rms_norm(
        *(context.handle, dtype_code(weight.dtype), address(x, torch.float32), address(weight)),
        *(x.shape[0], x.shape[1], eps, address(out)),
    )
    return out


def rotary_kv_write(
    context: Context,
    projected: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: RaggedBatch,
    inverse_frequencies: Tensor,
    head_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate queries and keys, write keys and values to their slots, return the queries [tokens,
    heads, head_dim].

    projected: float32 [tokens, heads + 2 * kv_heads, head_dim]; caches as in `kv_write`; head_norm:
    [heads + kv_heads, head_dim], norms query and key heads first.
    """
    tokens, rows, head_dim = projected.shape
    kv_heads, dtype = key_cache.shape[2], key_cache.dtype
    heads = rows - 2 * kv_heads
    query = torch.empty((tokens, heads, head_dim), dtype=dtype)
    layer = LayerStruct(head_norm=address(head_norm, dtype))
    model = ModelStruct(
        dtype=dtype_code(dtype),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=eps,
        inverse_frequencies=address(inverse_frequencies, torch.float32),
    )
    context.library.tandem_rotary_kv_write(
        *(context.handle, model, layer, BatchView(batch).struct),
        *(address(projected, torch.float32), address(query)),
        *(block_address(key_cache), block_address(value_cache, dtype), key_cache.stride(0)),
    )
    return query


def paged_attention(
    context: Context,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: RaggedBatch,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """As the reference of the same name."""
    heads, head_dim = query.shape[1:]
    if head_dim > MOST_HEAD_DIM or not heads or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; allowed: even, up to {MOST_HEAD_DIM}")
    dtype = query.dtype
    view = BatchView(batch)
    output = torch.empty_like(query)
    status = context.library.tandem_paged_attention(
        *(context.handle, dtype_code(dtype), view.struct, address(query)),
        *(block_address(key_cache, dtype), block_address(value_cache, dtype)),
        *(key_cache.stride(0), address(output)),
        *(heads, key_cache.shape[2], head_dim, scale, window or 0),
    )
    check(status)
    return output


def argmax(context: Context, logits: Tensor) -> Tensor:
    """Return the likeliest token of each row, the lowest id among equals. logits: float32 [rows,
    vocab]."""
    return _choose(context, logits, (None,) * 6)


def sample_tokens(
    context: Context,
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """As the reference of the same name."""
    truncation = (top_k, top_p, min_p) if None not in (top_k, top_p, min_p) else (None,) * 3
    return _choose(context, logits, (temperatures, seeds, positions, *truncation))


def kv_pack(
    kv: Tensor, first_layer: int, num_layers: int, slots: Tensor, out: Tensor | None = None
) -> Tensor:
    """As the reference of the same name. Any thread may call it."""
    if out is None:
        # A tensor that other threads may fill again, outside of inference mode.
        with torch.inference_mode(False):
            out = torch.empty((num_layers, 2, len(slots), *kv.shape[4:]), dtype=kv.dtype)
    _kv_copy(kv, first_layer, num_layers, slots, out, into_cache=False)
    return out


def kv_unpack(
    kv: Tensor, first_layer: int, num_layers: int, slots: Tensor, staging: Tensor
) -> None:
    """As the reference of the same name. Any thread may call it."""
    _kv_copy(kv, first_layer, num_layers, slots, staging, into_cache=True)


def _kv_copy(
    kv: Tensor, first: int, count: int, slots: Tensor, staging: Tensor, into_cache: bool
) -> None:
    library = load_library()
    num_blocks, block_size, kv_heads, head_dim = kv.shape[2:]
    expected = (count, 2, len(slots), kv_heads, head_dim)
    if tuple(staging.shape) != expected or not 0 <= first <= first + count <= kv.shape[0]:
        raise ValueError(f"staging has shape {tuple(staging.shape)}, the slots imply {expected}")
    if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < num_blocks * block_size:
        raise IndexError(f"slots reach past the cache's {num_blocks * block_size}")
    if library is None:
        raise RuntimeError("the C++ kernels were not built when the package was installed")
    library.tandem_kv_copy(
        *(cache_struct(kv, unit=kv.element_size()), first, count, block_size),
        *(kv_heads * head_dim * kv.element_size(), address(slots, torch.int64), len(slots)),
        *(address(staging, kv.dtype), int(into_cache)),
    )


_CHOICE_DTYPES = (
    *(torch.float32, torch.int64, torch.int64),
    *(torch.int64, torch.float64, torch.float32),
)
"""Of temperatures, seeds, positions, top_k, top_p, min_p."""


def _choose(context: Context, logits: Tensor, columns: Sequence[Tensor | None]) -> Tensor:
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    addresses = [address(*column) for column in zip(columns, _CHOICE_DTYPES, strict=True)]
    if any(column is not None and column.shape != (rows,) for column in columns):
        raise ValueError(f"the logits have {rows} rows; so must all that is said of them")
    status = context.library.tandem_choose(
        *(context.handle, address(logits, torch.float32), rows, vocab),
        *(*addresses, address(out)),
    )
    check(status)
    return out


def _checked_rows(packed: PackedLinear, x: Tensor) -> int:
    if x.dim() != 2 or x.shape[1] != packed.inputs or x.dtype != packed.panels.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; the weight takes {packed.panels.dtype} "
            f"[rows, {packed.inputs}]"
        )
    return x.shape[0]


def _linear_arguments(
    context: Context, packed: PackedLinear, x: Tensor, out: Tensor
) -> tuple[object, ...]:
    struct = ctypes.pointer(packed.struct)
    return (
        *(context.handle, dtype_code(x.dtype), struct, address(x)),
        *(x.shape[0], address(out)),
    )
