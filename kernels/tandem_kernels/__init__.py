"""The operations of a forward pass, one per file. The torch reference defines what is right.

Every operation is a function of tensors (and of one `RaggedBatch`, which says which rows belong to
which sequence); none keeps state. Callers import from this package only: `implementation.py` picks
the fastest body for each kind of device behind the same name.
"""

from tandem_kernels.choice import Choice
from tandem_kernels.dispatched import (
    add_rms_norm,
    apply_penalties,
    apply_rotary,
    gumbel_noise,
    kv_pack,
    kv_unpack,
    kv_write,
    paged_attention,
    rms_norm,
    rotary_kv_write,
    sample_tokens,
    silu_mul,
    truncate_logits,
)
from tandem_kernels.gumbel import uniform_bits
from tandem_kernels.implementation import REFERENCE, implementation, runs_compiled_decoder
from tandem_kernels.logprobs import TopLogprobs, top_logprobs
from tandem_kernels.ragged_batch import RaggedBatch
from tandem_kernels.rotary import rotary_tables
from tandem_kernels.sampling import REFERENCE_CHOICE
from tandem_kernels.upload import upload

__all__ = [
    "REFERENCE",
    "REFERENCE_CHOICE",
    "Choice",
    "RaggedBatch",
    "TopLogprobs",
    "add_rms_norm",
    "apply_penalties",
    "apply_rotary",
    "gumbel_noise",
    "implementation",
    "kv_pack",
    "kv_unpack",
    "kv_write",
    "paged_attention",
    "rms_norm",
    "rotary_kv_write",
    "rotary_tables",
    "runs_compiled_decoder",
    "sample_tokens",
    "silu_mul",
    "top_logprobs",
    "truncate_logits",
    "uniform_bits",
    "upload",
]
