"""Chat messages to prompt text, by the model's own Jinja template.

The template runs in a sandbox with what Hugging Face templates expect: `raise_exception`,
`strftime_now`, `tojson` that leaves characters as they are, loop controls and the `generation` tag.
Checks nothing about messages beyond what the template itself refuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from tandem.core.errors import InvalidRequestError, ModelLoadError
from tandem.modelfiles import read_json


class ChatTemplate:
    """A compiled template. Immutable after construction."""

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        """Raises `ModelLoadError` if the template does not compile."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"chat template: {error}") from error
        self._named_tokens = dict(named_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt. Raises `InvalidRequestError` if the template fails on the messages."""
        try:
            return self._template.render(
                {
                    **self._named_tokens,
                    "tools": None,
                    "documents": None,
                    **(variables or {}),
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:  # a template may fail in any way on messages it does not expect
            raise InvalidRequestError(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error


def load_chat_template(directory: Path, named_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """Return the chat template of a model directory, or None if it has none.

    `chat_template.jinja` wins over the entry in `tokenizer_config.json`; of several named
    templates there, `default` is taken.
    """
    file = directory / "chat_template.jinja"
    source: Any
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    else:
        source = read_json(directory, "tokenizer_config.json", required=False).get("chat_template")
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    return ChatTemplate(source, named_tokens) if isinstance(source, str) and source else None


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is plain text."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
