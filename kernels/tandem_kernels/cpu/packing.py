"""Weights in the order in which the kernels read them: panels of 32 outputs, inputs in turn.

A packed weight takes the place of the tensor that it was made from (plus zeros that fill the last
panel); decode, large prompts and the embedding all read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem_kernels.cpu.context import Context, address, dtype_code, prefer_huge_pages
from tandem_kernels.cpu.library import PANEL, LinearStruct


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight [outputs, inputs] and its bias."""

    panels: Tensor
    """[panels, inputs, 32] in the weight's dtype, in the order of `native/abi.h`."""
    bias: Tensor | None
    outputs: int
    inputs: int

    @property
    def struct(self) -> LinearStruct:
        """What the library is given; valid while this object lives."""
        dtype = self.panels.dtype
        return LinearStruct(
            address(self.panels), address(self.bias, dtype), self.outputs, self.inputs
        )


def can_pack(inputs: int, dtype: torch.dtype) -> bool:
    """Whether rows of this length split into whole 32-bit units."""
    return inputs * dtype.itemsize % 4 == 0


def pack_linear(context: Context, weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Pack a weight [outputs, inputs]."""
    return _pack(context, [weight], bias)


def pack_gate_up(context: Context, weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Pack gate and up, [2 * inner, inputs], panel by panel in turn: silu(gate) * up needs both."""
    gate, up = weight.chunk(2)
    return _pack(context, [gate, up], bias)


def unpack_rows(packed: PackedLinear, rows: Tensor) -> Tensor:
    """Return rows of the weight that was packed, [len(rows), inputs]. rows: int64."""
    per_unit = 4 // packed.panels.dtype.itemsize
    units = packed.panels.view(-1, packed.inputs // per_unit, PANEL, per_unit)
    return units[rows // PANEL, :, rows % PANEL].reshape(len(rows), packed.inputs)


def _pack(context: Context, parts: list[Tensor], bias: Tensor | None) -> PackedLinear:
    rows, inputs = parts[0].shape
    dtype = parts[0].dtype
    if not can_pack(inputs, dtype):
        raise ValueError(f"rows of {inputs} {dtype} do not split into units of 32 bits")
    panels_of_part = -(-rows // PANEL)
    panels = torch.empty((len(parts) * panels_of_part, inputs, PANEL), dtype=dtype)
    prefer_huge_pages(panels)
    for index, part in enumerate(parts):
        context.library.tandem_pack(
            *(context.handle, dtype_code(dtype), address(part), rows, inputs),
            *(address(panels), index, len(parts)),
        )
    return PackedLinear(panels, bias, rows * len(parts), inputs)
