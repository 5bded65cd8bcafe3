"""Tiny models, made once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tiny_models import make_tiny_model

TinyModel = Callable[[str], Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
