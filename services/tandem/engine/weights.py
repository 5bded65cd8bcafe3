"""Reads tensors from a checkpoint: safetensors files, one or several, mapped into memory.

Every tensor is checked against the shape that the decoder expects before it is copied into place,
and at the end every tensor must have been asked for: a checkpoint that the decoder does not fully
understand would run and answer wrongly. Knows names, shapes and bytes; not what they mean.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tandem.core.errors import ModelLoadError
from tandem.engine.memory import readable
from tandem.modelfiles import read_json

Progress = Callable[[str, float], None]
"""Called with the name of a stage and how much of it is done, 0 to 1."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DERIVED = ("rotary_emb.inv_freq",)
"""Tensors of old checkpoints that follow from the configuration."""


def find_weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, sorted by name; all of them exist."""
    if (model_dir / SINGLE_FILE).is_file():
        return [model_dir / SINGLE_FILE]
    if not (model_dir / INDEX_FILE).is_file():
        raise ModelLoadError(
            f"{model_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; "
            "weights are read from safetensors files only"
        )
    weight_map = read_json(model_dir, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{model_dir / INDEX_FILE}: weight_map is missing or empty")
    paths = sorted({model_dir / str(name) for name in weight_map.values()})
    for path in paths:
        if not path.is_file():
            raise ModelLoadError(f"{path}: missing, but named in {INDEX_FILE}")
    return paths


class Part(NamedTuple):
    """A range of one dimension of a tensor: `length` of `total`, from `start` on."""

    dimension: int
    start: int
    length: int
    total: int


class WeightSource(Protocol):
    """Where a decoder's tensors come from."""

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Copy a tensor, or a part of it, into `out`, converting its dtype."""

    def check_all_read(self, ignored: Sequence[str] = ()) -> None:
        """Raise `ModelLoadError` naming tensors that nothing asked for."""


class Checkpoint:
    """The tensors of one model directory. Several threads may read at once."""

    def __init__(self, model_dir: Path, progress: Progress | None = None) -> None:
        self._model_dir = model_dir
        self._progress = progress
        self._files = {path: _open(path) for path in find_weight_files(model_dir)}
        self._path_of: dict[str, Path] = {}
        for path, file in self._files.items():
            self._path_of.update(dict.fromkeys(file.keys(), path))
        self._unread = set(self._path_of)
        self._elements = {name: self._count(name) for name in self._path_of}
        self._lock = threading.Lock()
        self._read = 0
        self._started = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._path_of

    def read_into(self, name: str, out: Tensor, part: Part | None = None) -> None:
        """Copy a tensor, or a part of it, into `out`, converting its dtype.

        Raises `ModelLoadError` if it is missing, has another shape or a dtype that we do not read.
        """
        path = self._path_of.get(name)
        if path is None:
            raise ModelLoadError(f"{self._model_dir}: tensor {name} is missing from the checkpoint")
        described = self._files[path].get_slice(name)
        shape, dtype = tuple(described.get_shape()), described.get_dtype()
        expected = list(out.shape)
        if part is not None:
            expected[part.dimension] = part.total
        if shape != tuple(expected):
            raise ModelLoadError(
                f"{path}: tensor {name} has shape {shape}, config.json implies {tuple(expected)}"
            )
        if dtype not in _STORED:
            raise ModelLoadError(
                f"{path}: tensor {name} is {dtype}; supported: {', '.join(_STORED)}"
            )
        if part is None:
            out.copy_(self._files[path].get_tensor(name))
        else:
            wanted = slice(part.start, part.start + part.length)
            out.copy_(described[(slice(None),) * part.dimension + (wanted,)])
        self._note(name, out.element_size())

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(self._elements.values())

    def _count(self, name: str) -> int:
        return prod(self._files[self._path_of[name]].get_slice(name).get_shape())

    def _note(self, name: str, itemsize: int) -> None:
        """Say how much has been read, in bytes as they are held."""
        with self._lock:
            if name in self._unread:
                self._unread.discard(name)
                self._read += self._elements[name]
            total = max(1, self.num_elements)
            if self._progress is not None:
                amount = f"{readable(self._read * itemsize)} of {readable(total * itemsize)}"
                seconds = time.monotonic() - self._started
                self._progress(f"loading weights, {amount}, {seconds:.1f} s", self._read / total)

    def check_all_read(self, ignored: Sequence[str] = ()) -> None:
        """Raise `ModelLoadError` naming tensors that nothing asked for."""
        left = sorted(
            name for name in self._unread if name not in ignored and not name.endswith(_DERIVED)
        )
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ModelLoadError(
                f"{self._model_dir}: the checkpoint holds tensors that its architecture "
                f"has no place for: {', '.join(left[:3])}{more}"
            )


def _open(path: Path) -> Any:
    """Map a file. The library checks that the header is sound and covers the file exactly."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not a whole safetensors file: {error}") from error
