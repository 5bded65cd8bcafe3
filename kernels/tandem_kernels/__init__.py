"""The operations of a forward pass, one per file. The torch reference defines what is right.

Every operation is a function of tensors (and of one `RaggedBatch`, which says which rows belong to
which sequence); none keeps state. Callers import from this package only, so that an operation can
gain a faster body for one kind of device behind the same name.
"""

from tandem_kernels.gumbel import gumbel_noise, uniform_bits
from tandem_kernels.kv_pack import kv_pack, kv_unpack
from tandem_kernels.kv_write import kv_write
from tandem_kernels.logprobs import TopLogprobs, top_logprobs
from tandem_kernels.paged_attention import paged_attention
from tandem_kernels.penalties import apply_penalties
from tandem_kernels.ragged_batch import RaggedBatch
from tandem_kernels.rms_norm import add_rms_norm, rms_norm
from tandem_kernels.rotary import apply_rotary, rotary_tables
from tandem_kernels.silu_mul import silu_mul
from tandem_kernels.truncation import truncate_logits

__all__ = [
    "RaggedBatch",
    "TopLogprobs",
    "add_rms_norm",
    "apply_penalties",
    "apply_rotary",
    "gumbel_noise",
    "kv_pack",
    "kv_unpack",
    "kv_write",
    "paged_attention",
    "rms_norm",
    "rotary_tables",
    "silu_mul",
    "top_logprobs",
    "truncate_logits",
    "uniform_bits",
]
