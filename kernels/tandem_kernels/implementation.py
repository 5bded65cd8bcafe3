"""Which implementation of the operations runs on which kind of device. Chosen once, at first use.

The torch reference runs everywhere and defines what is right. A faster implementation gives an
`Operations` with some of its functions replaced; what it does not replace stays the reference.
Setting TANDEM_KERNELS=reference keeps the reference on every device; TANDEM_KERNELS=triton takes
the Triton kernels on every device, which on a CPU is for Triton's interpreter.

Not here: the bodies. They live in one file per operation (reference) and one folder per
implementation.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from tandem_kernels import gumbel as gumbel_reference
from tandem_kernels import kv_pack as kv_pack_reference
from tandem_kernels import kv_write as kv_write_reference
from tandem_kernels import paged_attention as attention_reference
from tandem_kernels import penalties as penalties_reference
from tandem_kernels import rms_norm as norm_reference
from tandem_kernels import rotary as rotary_reference
from tandem_kernels import rotary_kv_write as rotary_kv_write_reference
from tandem_kernels import sampling as sampling_reference
from tandem_kernels import silu_mul as silu_reference
from tandem_kernels import truncation as truncation_reference
from tandem_kernels.cpu import operations as cpu_operations
from tandem_kernels.cpu.library import load_library

ENVIRONMENT_VARIABLE = "TANDEM_KERNELS"


@dataclass(frozen=True)
class Operations:
    """One function per operation, with the reference's signature."""

    name: str = "torch reference"
    rms_norm: Callable[..., Tensor] = norm_reference.rms_norm
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = norm_reference.add_rms_norm
    apply_rotary: Callable[..., Tensor] = rotary_reference.apply_rotary
    kv_write: Callable[..., None] = kv_write_reference.kv_write
    rotary_kv_write: Callable[..., Tensor] = rotary_kv_write_reference.rotary_kv_write
    paged_attention: Callable[..., Tensor] = attention_reference.paged_attention
    silu_mul: Callable[..., Tensor] = silu_reference.silu_mul
    kv_pack: Callable[..., Tensor] = kv_pack_reference.kv_pack
    kv_unpack: Callable[..., None] = kv_pack_reference.kv_unpack
    gumbel_noise: Callable[..., Tensor] = gumbel_reference.gumbel_noise
    apply_penalties: Callable[..., None] = penalties_reference.apply_penalties
    truncate_logits: Callable[..., None] = truncation_reference.truncate_logits
    sample_tokens: Callable[..., Tensor] = sampling_reference.sample_tokens


REFERENCE = Operations()


@cache
def operations(device_type: str) -> Operations:
    """Return what runs on a kind of device: "cpu", "cuda"."""
    if reference_is_forced():
        return REFERENCE
    if device_type == "cuda" or triton_is_forced():
        return _triton()
    if device_type == "cpu" and (library := load_library()) is not None:
        return Operations(
            name=library.tandem_kernels_name().decode(),
            kv_pack=cpu_operations.kv_pack,
            kv_unpack=cpu_operations.kv_unpack,
        )
    return REFERENCE


def implementation(device: torch.device | str) -> str:
    """Return the name of what runs on `device`, for people to read.

    On CUDA it may grow once the first prompt is computed: see `flashinfer_attention`.
    """
    name = operations(torch.device(device).type).name
    if name.startswith("Triton"):
        from tandem_kernels import triton

        return ", ".join(filter(None, (name, triton.describe_chunk_kernels())))
    return name


def runs_compiled_decoder(device: torch.device | str) -> bool:
    """Whether whole forward passes on `device` go to `tandem_kernels.cpu`, not op by op."""
    device_type = torch.device(device).type
    if device_type != "cpu" or triton_is_forced():
        return False
    return operations(device_type) is not REFERENCE


def reference_is_forced() -> bool:
    """Whether the environment keeps every device on the reference. Raises ValueError if the
    variable says something else."""
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value not in ("", "reference", "triton"):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} is {value!r}; allowed: reference, triton, or unset"
        )
    return value == "reference"


def triton_is_forced() -> bool:
    """Whether the environment takes the Triton kernels on every device."""
    return os.environ.get(ENVIRONMENT_VARIABLE) == "triton"


def _triton() -> Operations:
    """The Triton kernels; the reference, named as such, where `triton` is not installed."""
    if find_spec("triton") is None:
        return replace(REFERENCE, name="torch reference (triton is not installed)")
    from tandem_kernels import triton

    return Operations(
        name=triton.describe(),
        **{name: getattr(triton, name) for name in triton.REPLACES},
    )
