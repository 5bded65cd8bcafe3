"""The served model as the gateway needs it: names and lengths, tokenizer, template, defaults.

Which model that is comes from the cluster's membership, so that a gateway may start before the
workers; its files are read in a thread when it is first known, and again if it changes. Holds no
weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from tandem.core.errors import InvalidRequestError, TandemError, UnavailableError
from tandem.gateway.interfaces import Dispatcher, ModelInfo
from tandem.gateway.text.chat_template import ChatTemplate, load_chat_template
from tandem.gateway.text.tokenizer import Tokenizer, load_tokenizer
from tandem.modelfiles import model_revision, read_json

_DEFAULT_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
_RETRY_SECONDS = 5.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model, ready to take requests."""

    info: ModelInfo
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: Mapping[str, float]
    """From generation_config.json: what a request leaves open. See `_DEFAULT_FIELDS`."""
    revision: str = ""
    """Changes when a file of the model directory does."""

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Return the prompt text of a chat; `InvalidRequestError` if there is no template."""
        if self.chat_template is None:
            raise InvalidRequestError(
                f"model {self.info.name!r} has no chat template; use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        return self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )


def load_served_model(info: ModelInfo) -> ServedModel:
    """Read the files of a model directory. Raises `ModelLoadError` naming the file at fault."""
    directory = Path(info.path)
    tokenizer = load_tokenizer(directory)
    config = read_json(directory, "generation_config.json", required=False)
    defaults = {
        name: value
        for name in _DEFAULT_FIELDS
        if isinstance(value := config.get(name), int | float) and not isinstance(value, bool)
    }
    template = load_chat_template(directory, tokenizer.named_tokens)
    revision = model_revision(directory)
    return ServedModel(info, tokenizer, template, MappingProxyType(defaults), revision)


class ModelLoader:
    """Keeps the `ServedModel` that belongs to the dispatcher's current membership."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._loaded: ServedModel | None = None
        self._failed: tuple[ModelInfo, str] | None = None
        self._loading = asyncio.Lock()

    @property
    def current(self) -> ServedModel | None:
        """The model if it is loaded and is still the one that the cluster serves."""
        loaded = self._loaded
        return loaded if loaded is not None and loaded.info == self._dispatcher.model else None

    @property
    def why_not(self) -> str:
        """Why `current` is None, in words."""
        info = self._dispatcher.model
        if info is None:
            return "no worker has registered a model yet"
        if self._failed is not None and self._failed[0] == info:
            return f"the tokenizer of {info.name!r} could not be loaded: {self._failed[1]}"
        return f"the tokenizer of {info.name!r} is being loaded"

    async def get(self) -> ServedModel:
        """Return the current model, loading it first if need be.

        Raises `UnavailableError` while there is none.
        """
        if (model := self.current) is not None:
            return model
        async with self._loading:
            info = self._dispatcher.model
            if self.current is None and info is not None and self._failed_info != info:
                await self._load(info)
        if (model := self.current) is not None:
            return model
        raise UnavailableError(f"no model is served: {self.why_not}", code="model_not_ready")

    async def watch(self) -> None:
        """Load the model as soon as it is known, and again when it changes. Runs until cancelled.

        A model that cannot be loaded is tried again after a while: its files may be repaired.
        """
        while True:
            while self._dispatcher.model is None or self.current is not None:
                await self._dispatcher.changes.wait()
            try:
                await self.get()
            except UnavailableError:
                if self._failed is not None:
                    await asyncio.sleep(_RETRY_SECONDS)  # nothing tells of a repaired file
                    self._failed = None

    @property
    def _failed_info(self) -> ModelInfo | None:
        return self._failed[0] if self._failed else None

    async def _load(self, info: ModelInfo) -> None:
        try:
            self._loaded = await asyncio.to_thread(load_served_model, info)
        except (TandemError, OSError) as error:
            self._failed = (info, str(error))
            _log.error("model not usable", model=info.name, path=info.path, error=str(error))
        else:
            self._failed = None
            _log.info("model known", model=info.name, path=info.path)
            self._dispatcher.changes.notify()
