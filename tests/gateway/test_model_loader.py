"""The gateway follows the model that the membership names."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.core.errors import UnavailableError
from tandem.gateway.model import ModelLoader


async def test_an_unknown_model_is_waited_for(dispatcher: Any) -> None:
    info, dispatcher.model = dispatcher.model, None
    loader = ModelLoader(dispatcher)
    with pytest.raises(UnavailableError, match="no worker has registered"):
        await loader.get()
    dispatcher.model = info
    assert (await loader.get()).info == info
    assert loader.current is not None


async def test_another_model_replaces_the_first(dispatcher: Any) -> None:
    loader = ModelLoader(dispatcher)
    first = await loader.get()
    dispatcher.model = replace(dispatcher.model, name="other")
    assert loader.current is None
    second = await loader.get()
    assert (first.info.name, second.info.name) == ("tiny", "other")


async def test_unusable_files_are_named_and_do_not_end_the_gateway(
    dispatcher: Any, model_dir: Path, tmp_path: Path
) -> None:
    good = dispatcher.model
    dispatcher.model = replace(good, path=str(tmp_path))
    loader = ModelLoader(dispatcher)
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"tokenizer\.json is missing"):
            await loader.get()
    shutil.copy(model_dir / "tokenizer.json", tmp_path)
    dispatcher.model = good
    assert (await loader.get()).info == good
