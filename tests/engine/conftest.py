"""Tiny models, made once per session, and the choice of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tandem_kernels.cpu.library import load_library
from tandem_kernels.implementation import ENVIRONMENT_VARIABLE, operations
from tiny_models import make_tiny_model

TinyModel = Callable[[str], Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["C++", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with each implementation of the operations on CPUs."""
    if request.param == "reference":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    elif load_library() is None:
        pytest.skip("installed without a C++ compiler")
    operations.cache_clear()
    yield request.param
    operations.cache_clear()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Return the directory of a tiny model by the name of its architecture."""
    made: dict[str, Path] = {}

    def directory(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_tiny_model(
                architecture, tmp_path_factory.mktemp(architecture)
            )
        return made[architecture]

    return directory
