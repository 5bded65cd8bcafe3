"""The `usage` of a whole answer, from the usage of its choices."""

from __future__ import annotations

from typing import Any

from tandem.gateway.output import Usage


class UsageTally:
    """A prompt is counted once, however many choices were drawn for it."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._prompt = self._cached = self._completion = 0

    def add(self, index: int, usage: Usage) -> None:
        """Count a finished choice."""
        self._completion += usage.completion_tokens
        if index % self._n == 0:
            self._prompt += usage.prompt_tokens
            self._cached += usage.cached_tokens

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }
