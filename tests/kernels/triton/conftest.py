"""The Triton tests need the `triton` package: `make test-triton` installs it and runs them.

Without a GPU they run on Triton's interpreter, which `tests/conftest.py` switches on. Interpreters
before 3.9 fail on loops of run-time length with the numpy that we install.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: object, parent: object) -> None:
    if find_spec("triton") is None:
        pytest.skip("the `triton` package is not installed", allow_module_level=True)
    number = tuple(map(int, version("triton").split(".")[:2]))
    if number < (3, 9) and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter is usable from 3.9 on", allow_module_level=True)
