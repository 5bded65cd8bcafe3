"""The request fields that chat and completions share, and how a client may write them.

Types are strict: a number in quotes is a mistake of the client, not a number. Ranges are checked
where all edges check them, in `gateway.params`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from tandem.core.errors import InvalidRequestError
from tandem.gateway.params import SamplingOptions


def _one_or_many(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return _tuple(value)


def _tuple(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else value


def _token_biases(value: Any) -> Any:
    """JSON object keys are strings; token ids are numbers."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except ValueError as error:
        raise ValueError("Keys must be token ids") from error


class StrictModel(BaseModel):
    """No type is converted; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(StrictModel):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class GenerationFields(StrictModel):
    """What `/v1/chat/completions` and `/v1/completions` have in common."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_token_biases)] = None
    seed: int | None = None
    prompt_logprobs: int | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = ()
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_tuple)] = ()
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    priority: int | str | None = None
    cache_salt: str | None = None
    ttft_objective: float | None = None
    itl_objective: float | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that says the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def num_choices(self, limit: int) -> int:
        """Return `n`. Raises `InvalidRequestError` outside [1, limit]."""
        n = 1 if self.n is None else self.n
        if not 1 <= n <= limit:
            raise InvalidRequestError(f"n must be between 1 and {limit}, got {n}", param="n")
        return n

    def check_stream_options(self) -> None:
        """Raise `InvalidRequestError` for `stream_options` without `stream`, as OpenAI does."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed when stream is true", param="stream_options"
            )

    def sampling_options(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        default_max_tokens: int | None = None,
    ) -> SamplingOptions:
        """Return the sampling parameters as the client states them."""
        return SamplingOptions(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=_unsigned(self.seed),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            default_max_tokens=default_max_tokens,
        )


def _unsigned(seed: int | None) -> int | None:
    """OpenAI's seeds are signed 64-bit integers; ours are the same bits, unsigned."""
    return seed % 2**64 if seed is not None and -(2**63) <= seed < 0 else seed
