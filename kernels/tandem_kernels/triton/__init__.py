"""The operations of a forward pass as Triton kernels, for CUDA devices.

Same names, arguments and results as the torch reference in `tandem_kernels`, and a few fused ones
that the reference writes as several calls. Importing this package needs the `triton` package; with
`TRITON_INTERPRET=1` set before that import, the kernels run on the CPU, slowly, which is how they
are tested where there is no GPU. Tensors must lie on the current CUDA device.
"""

import triton

from tandem_kernels.triton.gumbel import gumbel_noise, uniform_bits
from tandem_kernels.triton.kv_pack import kv_pack, kv_unpack, kv_write
from tandem_kernels.triton.paged_attention import (
    AttentionPlan,
    describe_chunk_kernels,
    paged_attention,
)
from tandem_kernels.triton.rms_norm import add_rms_norm, rms_norm
from tandem_kernels.triton.rotary import apply_rotary, rotary_kv_write
from tandem_kernels.triton.sampling import sample_tokens, truncate_logits
from tandem_kernels.triton.silu_mul import silu_mul

REPLACES = (
    "rms_norm",
    "add_rms_norm",
    "apply_rotary",
    "kv_write",
    "rotary_kv_write",
    "paged_attention",
    "silu_mul",
    "kv_pack",
    "kv_unpack",
    "gumbel_noise",
    "truncate_logits",
    "sample_tokens",
)
"""The operations of `tandem_kernels.implementation.Operations` that are done here."""


def describe() -> str:
    """What runs, for people to read."""
    return f"Triton {triton.__version__}"


__all__ = [
    "REPLACES",
    "AttentionPlan",
    "add_rms_norm",
    "apply_rotary",
    "describe",
    "describe_chunk_kernels",
    "gumbel_noise",
    "kv_pack",
    "kv_unpack",
    "kv_write",
    "paged_attention",
    "rms_norm",
    "rotary_kv_write",
    "sample_tokens",
    "silu_mul",
    "truncate_logits",
    "uniform_bits",
]
