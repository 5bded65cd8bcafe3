"""The Triton tests need the `triton` package: `pip install -e '.[gpu]'`.

Without a GPU they run on Triton's interpreter, which `tests/conftest.py` switches on.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: object, parent: object) -> None:
    if find_spec("triton") is None:
        pytest.skip("the `triton` package is not installed", allow_module_level=True)
