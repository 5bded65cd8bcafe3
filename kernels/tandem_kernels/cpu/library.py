"""Finds and loads the compiled library, and mirrors its C interface (`native/abi.h`).

The library is built when the package is installed with a C++ compiler at hand, and left out without
one. Nothing here computes; `context.py` and the modules above it are typed wrappers.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

PANEL = 32
"""Outputs of a packed weight that lie side by side."""
MOST_HEAD_DIM = 1024


class LinearStruct(ctypes.Structure):
    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("feed_forward_norm", c_void_p),
        ("head_norm", c_void_p),
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("window", c_int64),
    )


class ModelStruct(ctypes.Structure):
    _fields_ = (
        ("dtype", c_int64),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("inner", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("eps", c_double),
        ("layers", POINTER(LayerStruct)),
        ("final_norm", c_void_p),
        ("embedding", LinearStruct),
        ("inverse_frequencies", c_void_p),
    )


class BatchStruct(ctypes.Structure):
    _fields_ = (
        ("num_sequences", c_int64),
        ("num_tokens", c_int64),
        ("table_width", c_int64),
        ("block_size", c_int64),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
    )


class CacheStruct(ctypes.Structure):
    _fields_ = (("kv", c_void_p), ("plane_stride", c_int64), ("block_stride", c_int64))


_P, _N = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "tandem_kernels_name": (c_char_p, ()),
    "tandem_context_create": (_P, (_N, c_char_p)),
    "tandem_context_destroy": (None, (_P,)),
    "tandem_context_pin": (None, (_P, POINTER(c_int64))),
    "tandem_prefer_huge_pages": (None, (_P, _N)),
    "tandem_pack": (None, (_P, _N, _P, _N, _N, _P, _N, _N)),
    "tandem_linear": (c_int, (_P, _N, POINTER(LinearStruct), _P, _N, _P)),
    "tandem_silu_linear": (c_int, (_P, _N, POINTER(LinearStruct), _P, _N, _P)),
    "tandem_rms_norm": (None, (_P, _N, _P, _P, _N, _N, c_float, _P)),
    "tandem_rotary_kv_write": (
        None,
        (_P, POINTER(ModelStruct), POINTER(LayerStruct), POINTER(BatchStruct), _P, _P, _P, _P, _N),
    ),
    "tandem_paged_attention": (
        c_int,
        (_P, _N, POINTER(BatchStruct), _P, _P, _P, _N, _P, _N, _N, _N, c_float, _N),
    ),
    "tandem_forward": (
        c_int,
        (
            *(_P, POINTER(ModelStruct), POINTER(BatchStruct), POINTER(CacheStruct), _P, _N, _N),
            *(_P, _N, _P),
        ),
    ),
    "tandem_choose": (c_int, (_P, _P, _N, _N, _P, _P, _P, _P, _P, _P, _P)),
    "tandem_kv_copy": (None, (POINTER(CacheStruct), _N, _N, _N, _N, _P, _N, _P, _N)),
}


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library, or None if it was not built.

    Raises `OSError` if it is there and cannot be loaded: a broken install should be repaired, not
    run slowly.
    """
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    return open_library(built[0]) if built else None


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
