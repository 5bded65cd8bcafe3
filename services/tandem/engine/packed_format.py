"""The file of packed weights: a JSON header, then the tensors, each at a multiple of a page.

::

    "TANDEMPK" | header length, 8 bytes | header | zeros | tensor | zeros | tensor | ...

Written front to back with the header last, so a file that was not finished has no header. The
tensors of a file that was read lie in its mapping: private, and shared in memory by everyone who
maps it. Knows nothing of where files are kept.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tandem_kernels.cpu import PackedLayer, PackedLinear

Parts = Mapping[str, Any]
"""Tensors, and dataclasses of them, by name."""
Build = Callable[[Callable[[str, Any], None]], None]
"""Makes every part and hands it over by name."""

MAGIC = b"TANDEMPK"
VERSION = 1
_PAGE = 4096
_HEADER_BYTES = 2**20
"""Room at the front of a file; the header of a model of a hundred layers takes a fifth."""
_CLASSES = {kind.__name__: kind for kind in (PackedLayer, PackedLinear)}


class FormatError(Exception):
    """A file is no entry, not whole, or for something else."""


def write_entry(path: Path, identity: Mapping[str, object], build: Build) -> None:
    """Write the parts that `build` makes, one by one. Raises what `build` raises."""
    with path.open("wb") as file:
        writer = _Writer(file)
        build(writer.add)
        writer.finish(identity)


class _Writer:
    """Writes one file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._parts: dict[str, object] = {}
        self._tensors: list[dict[str, object]] = []
        self._end = _HEADER_BYTES

    def add(self, name: str, part: Any) -> None:
        """Write a part; it is not needed any more."""
        self._parts[name] = self._describe(part)

    def finish(self, identity: Mapping[str, object]) -> None:
        """Write the header: what came before is an entry now."""
        content = {
            "version": VERSION,
            "identity": dict(identity),
            "size": self._end,
            "parts": self._parts,
            "tensors": self._tensors,
        }
        header = json.dumps(content).encode()
        if len(header) > _HEADER_BYTES - 20:
            raise OSError(f"the header takes {len(header)} bytes; there is room for 1 MiB")
        self._file.seek(0)
        self._file.write(MAGIC + len(header).to_bytes(8, "little"))
        self._file.write(zlib.crc32(header).to_bytes(4, "little") + header)

    def _describe(self, part: Any) -> object:
        if isinstance(part, Tensor):
            return {"tensor": self._put(part)}
        if dataclasses.is_dataclass(part):
            fields = {f.name: self._describe(getattr(part, f.name)) for f in _fields(type(part))}
            return {"class": type(part).__name__, "fields": fields}
        return {"value": part}

    def _put(self, tensor: Tensor) -> int:
        data = _raw(tensor)
        self._end = -(-self._end // _PAGE) * _PAGE
        self._file.seek(self._end)
        self._file.write(data)
        self._tensors.append(
            {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "start": self._end,
                "crc32": zlib.crc32(data),
            }
        )
        self._end += len(data)
        return len(self._tensors) - 1


def read_entry(path: Path, identity: Mapping[str, object], threads: int) -> Parts:
    """Map a file, check every byte of it, and return its parts.

    Raises `FormatError` that says why the file cannot be used.
    """
    header = _read_header(path)
    for name, ours in identity.items():
        if header["identity"].get(name) != ours:
            raise FormatError(f"stale: {name} is not what the entry was made for")
    if path.stat().st_size != header["size"]:
        raise FormatError(f"damaged: {path.stat().st_size} bytes, {header['size']} were written")
    storage: Any = torch.UntypedStorage.from_file(str(path), False, header["size"])
    everything = torch.tensor([], dtype=torch.uint8).set_(storage)
    tensors = [_view(everything, described) for described in header["tensors"]]
    _check(tensors, header["tensors"], threads)
    return {name: _restore(part, tensors) for name, part in header["parts"].items()}


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise FormatError("damaged: it does not begin as packed weights do")
        length, checksum = (int.from_bytes(file.read(n), "little") for n in (8, 4))
        header = file.read(min(length, _HEADER_BYTES))
    if zlib.crc32(header) != checksum:
        raise FormatError("damaged: the header's checksum differs")
    content: dict[str, Any] = json.loads(header)
    if content["version"] != VERSION:
        raise FormatError(f"stale: version {content['version']} of the format")
    return content


def _view(everything: Tensor, described: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, described["dtype"])
    count = dtype.itemsize
    for size in described["shape"]:
        count *= size
    start = described["start"]
    return everything[start : start + count].view(dtype).view(described["shape"])


def _check(tensors: list[Tensor], described: list[dict[str, Any]], threads: int) -> None:
    def checksum(tensor: Tensor) -> int:
        return zlib.crc32(_raw(tensor))

    with ThreadPoolExecutor(threads, thread_name_prefix="check") as pool:
        for index, found in enumerate(pool.map(checksum, tensors)):
            if found != described[index]["crc32"]:
                raise FormatError(f"damaged: the checksum of tensor {index} differs")


def _raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, in place."""
    values: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(values)


def _restore(part: Mapping[str, Any], tensors: list[Tensor]) -> Any:
    if "tensor" in part:
        return tensors[part["tensor"]]
    if "value" in part:
        return part["value"]
    kind = _CLASSES[part["class"]]
    return kind(**{name: _restore(value, tensors) for name, value in part["fields"].items()})


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)
