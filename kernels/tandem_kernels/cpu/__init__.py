"""C++ kernels for CPUs: AVX-512 with bfloat16, AVX-512, AVX2 or plain, chosen at run time.

Built by the package's install where there is a compiler. Plain C++ behind a C interface, called
through ctypes; `native/` holds the source.
"""

from tandem_kernels.cpu.context import Context, is_supported, prefer_huge_pages
from tandem_kernels.cpu.decoder import CompiledDecoder, PackedLayer, PackedModel
from tandem_kernels.cpu.library import MOST_HEAD_DIM
from tandem_kernels.cpu.packing import (
    PackedLinear,
    can_pack,
    pack_gate_up,
    pack_linear,
    unpack_rows,
)

__all__ = [
    "MOST_HEAD_DIM",
    "CompiledDecoder",
    "Context",
    "PackedLayer",
    "PackedLinear",
    "PackedModel",
    "can_pack",
    "is_supported",
    "pack_gate_up",
    "pack_linear",
    "prefer_huge_pages",
    "unpack_rows",
]
