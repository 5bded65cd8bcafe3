"""Moves the KV of some tokens between blocks and one contiguous buffer, and writes new KV.

All three are one gather or scatter of rows: the row of a slot in one layer's keys or values. A
slice of heads is a slice of that row, so workers of unequal tensor parallelism exchange heads
without a copy in between. Negative slots are skipped on writing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements that one program moves: several short rows, or a part of a long one."""


def kv_pack(
    kv: Tensor,
    first_layer: int,
    num_layers: int,
    slots: Tensor,
    out: Tensor | None = None,
    first_head: int = 0,
    num_heads: int | None = None,
) -> Tensor:
    """Return a contiguous [num_layers, 2, len(slots), num_heads, head_dim] copy of the KV at
    `slots`.

    kv: [layers, 2, num_blocks, block_size, kv_heads, head_dim], blocks contiguous and keys and
    values of all layers evenly apart; slots: int64 on kv's device; num_heads None: all from
    first_head on. `out`, if given, is filled and returned.
    """
    kv_heads, head_dim = kv.shape[4:]
    heads = kv_heads - first_head if num_heads is None else num_heads
    shape = (num_layers, 2, len(slots), heads, head_dim)
    if out is None:
        out = torch.empty(shape, dtype=kv.dtype, device=kv.device)
    _move(kv[first_layer : first_layer + num_layers], slots, out, first_head, gather=True)
    return out


def kv_unpack(
    kv: Tensor,
    first_layer: int,
    num_layers: int,
    slots: Tensor,
    staging: Tensor,
    first_head: int = 0,
) -> None:
    """Write a packed buffer, shaped as `kv_pack` returns it, into the slots in place.

    Its heads go to first_head and those that follow; the other heads of a slot keep what they hold.
    """
    layers = kv[first_layer : first_layer + num_layers]
    _move(layers, slots, staging.contiguous(), first_head, gather=False)


def kv_write(
    key_cache: Tensor, value_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor
) -> None:
    """Write key and value, [tokens, kv_heads, head_dim], at `slots`, int64 [tokens], in place.

    Caches: [num_blocks, block_size, kv_heads, head_dim], of any block stride. No slot may occur
    twice.
    """
    for cache, rows in ((key_cache, key), (value_cache, value)):
        _move(cache[None, None], slots, rows.contiguous()[None, None], 0, gather=False)


def _move(kv: Tensor, slots: Tensor, packed: Tensor, first_head: int, *, gather: bool) -> None:
    """kv: [layers, kinds, blocks, block_size, heads, dim]; packed: [layers, kinds, count, heads,
    dim]."""
    layers, kinds, count, heads, head_dim = packed.shape
    if not packed.numel():
        return
    columns = heads * head_dim
    block_columns = min(_BLOCK, triton.next_power_of_2(columns))
    block_rows = _BLOCK // block_columns
    grid = (triton.cdiv(count, block_rows), layers * kinds, triton.cdiv(columns, block_columns))
    _move_kernel[grid](
        kv,
        slots,
        packed,
        count,
        kv.stride(1),
        kv.stride(2),
        kv.shape[3],
        kv.shape[4] * head_dim,
        first_head * head_dim,
        columns,
        ROWS=block_rows,
        COLUMNS=block_columns,
        GATHER=gather,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["slots"])
def _move_kernel(
    kv,
    slots,
    packed,
    count,
    plane_stride,
    block_stride,
    block_size,
    slot_stride,
    first_column,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHER: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    plane = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + rows, mask=rows < count, other=-1)
    inside = (slot >= 0)[:, None] & (columns < num_columns)[None, :]
    line_of_slot = slot // block_size * block_stride + slot % block_size * slot_stride
    place = kv + plane * plane_stride + line_of_slot[:, None] + first_column
    place += columns[None, :]
    line = packed + (plane * count + rows[:, None]) * num_columns + columns[None, :]
    if GATHER:
        tl.store(line, tl.load(place, mask=inside), mask=inside)
    else:
        tl.store(place, tl.load(line, mask=inside), mask=inside)
