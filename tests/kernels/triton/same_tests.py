"""Takes the reference's own tests and points them at the Triton kernels.

A test module is loaded a second time, from its file, and the names of the operations in it are
replaced; so a kernel answers for exactly what its reference answers for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem_kernels import triton as triton_ops

_TESTS = Path(__file__).parent.parent


def borrow(module: str, replaced: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """Return the test functions of `tests/kernels/<module>.py`, run against the named kernels."""
    path = _TESTS / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"triton_{module}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    for name in replaced:
        assert hasattr(loaded, name), f"{path.name} does not use {name}"
        setattr(loaded, name, getattr(triton_ops, name))
    return {name: value for name, value in vars(loaded).items() if name.startswith("test_")}
