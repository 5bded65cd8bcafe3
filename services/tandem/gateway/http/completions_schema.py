"""The body of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from tandem.core.errors import InvalidRequestError
from tandem.gateway.http.fields import GenerationFields
from tandem.gateway.params import SamplingOptions

DEFAULT_MAX_TOKENS = 16
"""What OpenAI's API takes for this endpoint."""
Prompt = str | tuple[int, ...]
_FORMS = "a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _prompts(value: Any) -> Any:
    """Return a tuple of prompts, each a text or token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _is_ids(value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(_is_ids(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError(f"Prompt must be {_FORMS}, and not empty")


class CompletionRequest(GenerationFields):
    """The whole body. `prompt` is one or more prompts in whichever form they came."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    def prompts(self) -> Sequence[Prompt]:
        """Return every prompt."""
        prompts: Sequence[Prompt] = self.prompt
        return prompts

    def check_best_of(self, n: int) -> None:
        """Raise `InvalidRequestError` unless `best_of` asks for nothing beyond `n`."""
        if self.best_of is not None and self.best_of != n:
            raise InvalidRequestError(
                f"best_of must be equal to n ({n}) or absent, got {self.best_of}",
                param="best_of",
                code="unsupported_parameter",
            )

    def sampling(self) -> SamplingOptions:
        """Return the sampling parameters; with echo, logprobs are for the prompt as well."""
        prompt_logprobs = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        return self.sampling_options(
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=prompt_logprobs,
            default_max_tokens=DEFAULT_MAX_TOKENS,
        )
