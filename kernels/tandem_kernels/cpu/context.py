"""A context: the threads that work for one caller, and the scratch memory that they share.

One thread uses a context at a time. While nothing runs its threads sleep.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from tandem_kernels.cpu.library import CacheStruct, load_library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def is_supported(dtype: torch.dtype) -> bool:
    """Whether the kernels know this dtype of weights, activations and KV."""
    return dtype in _DTYPES


def dtype_code(dtype: torch.dtype) -> int:
    """Return the library's number of a dtype. Raises `ValueError` for others than float32 and
    bfloat16."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; allowed: {', '.join(map(str, _DTYPES))}")
    return _DTYPES[dtype]


class Context:
    """Owns `threads` threads, the caller among them."""

    def __init__(
        self, threads: int, kernels: str | None = None, library: ctypes.CDLL | None = None
    ) -> None:
        """`kernels`: the name of a lesser instruction set than the machine's best, for tests.

        Raises `RuntimeError` where there is no library or the machine has no such instructions.
        """
        found = library if library is not None else load_library()
        if found is None:
            raise RuntimeError("the C++ kernels were not built when the package was installed")
        self.library: ctypes.CDLL = found
        self.threads = threads
        name = None if kernels is None else kernels.encode()
        handle = found.tandem_context_create(threads, name)
        if not handle:
            raise RuntimeError(f"no kernels named {kernels!r} for this machine")
        self.handle: int = handle
        weakref.finalize(self, found.tandem_context_destroy, handle)

    def pin(self, cores: Sequence[int]) -> None:
        """Keep each thread on a core. The first is for the caller, who pins itself: unless it does,
        a thread may wait for it behind its own back."""
        if len(cores) != self.threads:
            raise ValueError(f"{len(cores)} cores for {self.threads} threads")
        self.library.tandem_context_pin(self.handle, (ctypes.c_int64 * len(cores))(*cores))


def check(status: int) -> None:
    """Raise `MemoryError` for a call that could not get its scratch memory."""
    if status != 0:
        raise MemoryError("the CPU kernels could not allocate their scratch memory")


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages under a large tensor that has not been written yet. Only advice."""
    library = load_library()
    if library is not None:
        library.tandem_prefer_huge_pages(address(tensor), tensor.numel() * tensor.element_size())


def block_address(cache: Tensor, dtype: torch.dtype | None = None) -> int:
    """Return where the first block of [num_blocks, block_size, kv_heads, head_dim] lies. What is
    between two blocks may be anything. Raises `ValueError` as `address` does."""
    _check_blocks(cache, dtype)
    return cache.data_ptr()


def cache_struct(kv: Tensor, dtype: torch.dtype | None = None, unit: int = 1) -> CacheStruct:
    """Describe the KV of all layers, [layers, 2, num_blocks, block_size, kv_heads, head_dim].

    Keys and values of all layers must be evenly apart. Strides are in elements, or in as many bytes
    as `unit` says an element has. Raises `ValueError` as `address` does.
    """
    _check_blocks(kv, dtype)
    layer, plane, block = kv.stride()[:3]
    if kv.shape[0] > 1 and layer != 2 * plane:
        raise ValueError(f"KV of strides {kv.stride()} was given; allowed: layers evenly apart")
    return CacheStruct(kv.data_ptr(), plane * unit, block * unit)


def _check_blocks(cache: Tensor, dtype: torch.dtype | None) -> None:
    _, kv_heads, head_dim = cache.shape[-3:]
    _check(cache, dtype, fits=cache.stride()[-3:] == (kv_heads * head_dim, head_dim, 1))


def _check(tensor: Tensor, dtype: torch.dtype | None, *, fits: bool) -> None:
    """`fits`: whether its numbers lie as the kernels read them."""
    if not fits or tensor.device.type != "cpu":
        raise ValueError(f"a {tensor.device.type} tensor of strides {tensor.stride()} was given")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"dtype is {tensor.dtype}; allowed: {dtype}")


def address(tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
    """Return where a contiguous CPU tensor's data lies; None for None.

    Raises `ValueError` for a tensor that the kernels could not read.
    """
    if tensor is None:
        return None
    _check(tensor, dtype, fits=tensor.is_contiguous())
    return tensor.data_ptr()
