"""Which packed weights a worker may reuse: those of the same files, packed in the same way.

Not here: where they are kept (`packed_cache`) and how (`packed_format`).
"""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path

import torch

from tandem.core.config import ModelConfig
from tandem.engine.models.compiled import Keep
from tandem.engine.packed_cache import SMALLEST_BYTES, PackedCache, default_directory
from tandem.engine.spec import ModelSpec
from tandem.engine.weights import find_weight_files
from tandem_kernels import cpu, implementation


def packed_keeper(
    model_dir: Path, model: ModelConfig, spec: ModelSpec, num_elements: int
) -> Keep | None:
    """Return what keeps this model's packed weights; None where that is off or does not pay."""
    nbytes = num_elements * spec.torch_dtype.itemsize
    if model.packed_cache == "off" or nbytes < SMALLEST_BYTES:
        return None
    directory = Path(model.packed_cache).expanduser() if model.packed_cache else default_directory()
    cache = PackedCache(directory, model.packed_cache_bytes)
    name = f"{model_dir.resolve()}-{spec.dtype}-{implementation('cpu')}"
    identity = {
        "files": [_facts(path) for path in find_weight_files(model_dir)],
        "revision": spec.revision,
        "packing": _packing_fingerprint(spec.torch_dtype),
    }
    threads = torch.get_num_threads()
    return partial(cache.load, name, identity, nbytes, threads=threads)


def _facts(path: Path) -> list[object]:
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def _packing_fingerprint(dtype: torch.dtype) -> int:
    """What packing does to known numbers: it changes whenever the layout does."""
    context = cpu.Context(1)
    weight = torch.arange(2 * 48 * 64, dtype=torch.float32).reshape(2 * 48, 64).to(dtype)
    packed = (cpu.pack_linear(context, weight, None), cpu.pack_gate_up(context, weight, None))
    raw = (bytes(p.panels.flatten().view(torch.uint8).numpy()) for p in packed)
    return zlib.crc32(b"".join(raw))
