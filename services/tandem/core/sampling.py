"""How the tokens of one request are chosen and when it stops. Validation, no sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tandem.core.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
_NO_BIAS: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Complete sampling parameters: the gateway has filled in every default.

    `logprobs` / `prompt_logprobs`: None for none, else the number of alternatives beside the
    chosen token. `stop` strings are watched by the gateway, which owns the text; everything else by
    the worker, which owns the tokens.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        """Whether a draw depends on which tokens were drawn before it."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def validate(self, vocab_size: int) -> None:
        """Raise `InvalidRequestError` naming the first field that is out of range."""
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"between 0 and max_tokens ({self.max_tokens})",
        )
        _in_range(self.temperature, "temperature", 0.0, 2.0)
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 or -1 (off) or a positive integer")
        _in_range(self.min_p, "min_p", 0.0, 1.0)
        _require(
            0.0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "greater than 0 and finite",
        )
        _in_range(self.presence_penalty, "presence_penalty", -2.0, 2.0)
        _in_range(self.frequency_penalty, "frequency_penalty", -2.0, 2.0)
        _require(0 <= self.seed < 2**64, "seed", self.seed, "between 0 and 2**64 - 1")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            allowed = f"between 0 and {MAX_LOGPROBS}"
            _require(count is None or 0 <= count <= MAX_LOGPROBS, name, count, allowed)
        self._validate_lists(vocab_size)

    def _validate_lists(self, vocab_size: int) -> None:
        _require(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"{len(self.stop)} strings",
            f"at most {MAX_STOP_STRINGS} strings",
        )
        _require(all(self.stop), "stop", "an empty string", "non-empty strings")
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"{len(self.stop_token_ids)} ids",
            f"at most {MAX_STOP_TOKEN_IDS} ids",
        )
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            f"{len(self.logit_bias)} entries",
            f"at most {MAX_LOGIT_BIAS} entries",
        )
        for token_id in self.stop_token_ids:
            _token_id(token_id, "stop_token_ids", vocab_size)
        for token_id, bias in self.logit_bias.items():
            _token_id(token_id, "logit_bias", vocab_size)
            _in_range(bias, f"logit_bias[{token_id}]", -100.0, 100.0)


def validate_token_ids(token_ids: tuple[int, ...] | list[int], name: str, vocab_size: int) -> None:
    """Raise `InvalidRequestError` if an id is outside [0, vocab_size)."""
    for token_id in token_ids:
        _token_id(token_id, name, vocab_size)


def _token_id(token_id: int, name: str, vocab_size: int) -> None:
    _require(0 <= token_id < vocab_size, name, token_id, f"token ids in [0, {vocab_size})")


def _in_range(value: float, name: str, low: float, high: float) -> None:
    _require(low <= value <= high, name, value, f"between {low:g} and {high:g}")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise InvalidRequestError(f"{name} must be {allowed}, got {value}", param=name)
