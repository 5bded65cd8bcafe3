"""Fills in what a request leaves open and checks what it states. Pure.

Order of defaults: the request, the model's generation_config.json, the endpoint, the system.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from tandem.core.errors import InvalidRequestError
from tandem.core.sampling import SamplingParams, validate_token_ids
from tandem.gateway.interfaces import ModelInfo

MAX_STOP_STRING_CHARACTERS = 1024
MAX_CACHE_SALT_CHARACTERS = 1024
MAX_TENANT_CHARACTERS = 256
_INT32 = range(-(2**31), 2**31)
_LENGTH_CODE = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Sampling parameters as a client states them; None is left open."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    default_max_tokens: int | None = field(default=None, kw_only=True)
    """What the endpoint takes for max_tokens if neither request nor model says so."""


_PASSED_ON = frozenset(f.name for f in fields(SamplingParams)) - {"max_tokens"}
_FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def complete_sampling(
    options: SamplingOptions, prompt_len: int, info: ModelInfo, defaults: Mapping[str, float]
) -> SamplingParams:
    """Return complete, checked sampling parameters for a prompt of `prompt_len` tokens.

    Raises `InvalidRequestError` naming the field that is out of range, or the lengths that do not
    fit the context.
    """
    stated = {name: getattr(options, name) for name in _PASSED_ON}
    values = {name: value for name, value in stated.items() if value is not None}
    for name in _FROM_MODEL:
        if name not in values and name in defaults:
            values[name] = defaults[name]
    values.setdefault("seed", secrets.randbits(64))
    if "top_k" in values:
        values["top_k"] = _top_k(values["top_k"])
    _check_stop_strings(options.stop)
    params = SamplingParams(max_tokens=_max_tokens(options, prompt_len, info, defaults), **values)
    params.validate(info.vocab_size)
    return params


def check_prompt(token_ids: tuple[int, ...], name: str, info: ModelInfo) -> None:
    """Raise `InvalidRequestError` for an empty prompt, one over the context, or unknown ids."""
    if not token_ids:
        raise InvalidRequestError(f"{name} must not be empty", param=name)
    validate_token_ids(token_ids, name, info.vocab_size)
    if len(token_ids) >= info.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(token_ids)} tokens, but the context of model {info.name!r} is "
            f"{info.max_model_len} tokens, one of which must be left for the completion",
            param=name,
            code=_LENGTH_CODE,
        )


def check_account(tenant: str, ttft_objective: float, itl_objective: float) -> None:
    """Raise `InvalidRequestError` for a tenant or objectives that no scheduler can work with."""
    if len(tenant) > MAX_TENANT_CHARACTERS:
        raise InvalidRequestError(
            f"a tenant's name has at most {MAX_TENANT_CHARACTERS} characters, got {len(tenant)}",
            param="tenant",
        )
    for name, seconds in (("ttft_objective", ttft_objective), ("itl_objective", itl_objective)):
        if not 0 <= seconds < math.inf:
            raise InvalidRequestError(
                f"{name} must be seconds, 0 or more, got {seconds}", param=name
            )


def resolve_priority(priority: int | str, classes: Mapping[str, float]) -> int:
    """Return the number of a priority that is given as a number or as the name of a class.

    Raises `InvalidRequestError` for a name that is not configured and a number off the wire.
    """
    if isinstance(priority, str):
        if priority not in classes:
            names = ", ".join(classes)
            raise InvalidRequestError(
                f"priority must be a number or one of: {names}; got {priority!r}",
                param="priority",
            )
        priority = math.ceil(classes[priority])
    if priority not in _INT32:
        raise InvalidRequestError(
            f"priority must be a signed 32-bit integer, got {priority}", param="priority"
        )
    return priority


def check_salt(cache_salt: str) -> None:
    """Raise `InvalidRequestError` for a salt that is too long to be carried along."""
    if len(cache_salt) > MAX_CACHE_SALT_CHARACTERS:
        raise InvalidRequestError(
            f"cache_salt must be at most {MAX_CACHE_SALT_CHARACTERS} characters, "
            f"got {len(cache_salt)}",
            param="cache_salt",
        )


def _max_tokens(
    options: SamplingOptions, prompt_len: int, info: ModelInfo, defaults: Mapping[str, float]
) -> int:
    room = info.max_model_len - prompt_len
    if options.max_tokens is None:
        wanted = defaults.get("max_new_tokens", options.default_max_tokens)
        return room if wanted is None else max(1, min(room, int(wanted)))
    if options.max_tokens > room:
        raise InvalidRequestError(
            f"the context of model {info.name!r} is {info.max_model_len} tokens, but "
            f"{prompt_len + options.max_tokens} were asked for: {prompt_len} in the prompt and "
            f"{options.max_tokens} by max_tokens",
            param="max_tokens",
            code=_LENGTH_CODE,
        )
    return options.max_tokens


def _top_k(value: float) -> int:
    """-1 is another way to write 0, off."""
    return 0 if value == -1 else int(value)


def _check_stop_strings(stops: tuple[str, ...]) -> None:
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_STRING_CHARACTERS:
        raise InvalidRequestError(
            f"stop must be strings of at most {MAX_STOP_STRING_CHARACTERS} characters, "
            f"got one of {longest}",
            param="stop",
        )
