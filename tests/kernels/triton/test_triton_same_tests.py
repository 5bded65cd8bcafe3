"""The Triton kernels pass the tests of the torch reference."""

from __future__ import annotations

from tests.kernels.triton.same_tests import borrow

_LAYER_OPS = ("add_rms_norm", "rms_norm", "apply_rotary", "silu_mul", "kv_write", "kv_pack")

globals().update(borrow("test_layer_ops", (*_LAYER_OPS, "kv_unpack")))
globals().update(borrow("test_paged_attention", ("paged_attention", "kv_write")))
globals().update(borrow("test_gumbel", ("uniform_bits", "gumbel_noise")))
globals().update(
    {
        name: test
        for name, test in borrow("test_sampling_ops", ("truncate_logits",)).items()
        if "truncat" in name or "top_p" in name
    }
)
