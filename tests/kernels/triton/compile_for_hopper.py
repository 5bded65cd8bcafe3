"""Compiles every kernel for an H200 on a machine without one, and prints what each became.

Run as a program, in a process where the interpreter is off. Launches are turned into compilations:
Triton's own compiler and assembler need no GPU, only to be told which one is meant. The operations
are called with tensors on torch's `meta` device, which have shapes and no contents.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

from tandem_kernels import RaggedBatch
from tandem_kernels import triton as kernels
from tandem_kernels.triton import machine
from tandem_kernels.triton.chunk_attention import queries_per_tile

_PROCESSORS = 132
_SHARED_MEMORY = 227 * 1024


class _Hopper:
    """The parts of Triton's driver that compiling asks for."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


compiled: dict[int, dict[str, Any]] = {}


def _compile_only() -> None:
    driver.set_active(_Hopper())
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        args = tuple(MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in args)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[id(kernel)] = {
            "name": self.__name__,
            "shared": kernel.metadata.shared,
            "matrix": "wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"],
        }
        assert kernel.metadata.shared <= _SHARED_MEMORY, self.__name__
        return kernel

    JITFunction.run = compile_instead
    machine.num_processors = lambda device: _PROCESSORS


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_everything(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    x, weight = meta(32, 512, dtype=dtype), meta(512, dtype=dtype)
    kernels.rms_norm(x, weight, 1e-5)
    kernels.add_rms_norm(x, x, weight, 1e-5)
    kernels.silu_mul(x)
    blocks = meta(64, 2, 2, 16, kv_heads, head_dim, dtype=dtype)
    kv = blocks.permute(1, 2, 0, 3, 4, 5)
    qkv = meta(32, heads + 2 * kv_heads, head_dim, dtype=dtype)
    cos = meta(32, 1, head_dim // 2, dtype=dtype)
    parts = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
    kernels.rotary_kv_write(*parts, cos, cos, kv[0, 0], kv[0, 1], meta(32))
    kernels.kv_unpack(kv, 0, 2, meta(32), kernels.kv_pack(kv, 0, 2, meta(32)))
    for length in (1, 20, 512):
        for window in (None, 100):
            _attend(dtype, heads, kv, length, window)


def _attend(
    dtype: torch.dtype, heads: int, kv: torch.Tensor, length: int, window: int | None
) -> None:
    head_dim = kv.shape[5]
    query = meta(4 * length, heads, head_dim, dtype=dtype)
    ints = meta(4, dtype=torch.int32)
    none = meta(0, dtype=torch.int32)
    decodes = length == 1
    batch = RaggedBatch((), (), meta(4, 64), 16, meta(4 * length), meta(4 * length))
    kernels.AttentionPlan(
        context_lens=ints,
        query_starts=ints,
        query_lens=ints,
        decode_sequences=ints if decodes else none,
        longest_decode=1000,
        tile_sequences=none if decodes else ints,
        tile_offsets=none if decodes else ints,
        tile_size=queries_per_tile(length, query),
    ).attach(batch)
    kernels.paged_attention(query, kv[0, 0], kv[0, 1], batch, 0.1, window)


def sample() -> None:
    logits, numbers, ids = meta(4, 5000, dtype=torch.float32), meta(4, dtype=torch.float32), meta(4)
    top_p = meta(4, dtype=torch.float64)
    kernels.sample_tokens(logits, numbers, ids, ids, ids, top_p, numbers)
    kernels.truncate_logits(logits, ids, top_p, numbers)
    kernels.gumbel_noise(ids, ids, ids)
    kernels.uniform_bits(ids, ids, ids)


if __name__ == "__main__":
    _compile_only()
    sample()
    for case in json.loads(sys.argv[1]):
        call_everything(getattr(torch, case[0]), *case[1:])
    print(json.dumps({"triton": triton.__version__, "kernels": list(compiled.values())}))
