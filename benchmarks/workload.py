"""Which requests a run sends, and when: an excerpt of a trace, or a synthetic mix like it.

Pure but for reading the trace. The same arguments give the same workload, token for token, so that
both ways of serving answer the same requests.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, pairwise
from math import ceil
from pathlib import Path

# Of the Azure 2023 conversation trace: log-normal fits to its lengths, their range, and the
# coefficient of variation of its arrival gaps.
PROMPT_LOG_MEAN, PROMPT_LOG_DEVIATION = 6.633, 0.985
OUTPUT_LOG_MEAN, OUTPUT_LOG_DEVIATION = 5.019, 0.859
PROMPT_RANGE, OUTPUT_RANGE = (2, 14050), (7, 1000)
GAP_VARIATION = 1.09


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: when it came and how long it was, in seconds and tokens."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class PlannedRequest:
    """One request of a workload."""

    index: int
    at: float
    prompt: tuple[int, ...]
    max_tokens: int
    shared: bool
    """Its prompt begins with the system prompt that others begin with too."""


@dataclass(frozen=True)
class Mix:
    """How arrivals become a workload for one model."""

    rate: float
    """Requests per second, on average."""
    length_factor: float
    shared_fraction: float
    """How many of the requests begin with the system prompt, if they are longer than it."""
    system_prompt_tokens: int
    vocabulary: tuple[int, int]
    """Token ids are drawn from [first, last)."""
    max_model_len: int
    seed: int = 1


def read_trace(path: Path, count: int, skip: int = 0) -> list[Arrival]:
    """Return `count` consecutive requests of an Azure LLM inference trace after `skip` others.

    Columns: TIMESTAMP, ContextTokens, GeneratedTokens. Raises `ValueError` if there are too few.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(islice(csv.DictReader(file), skip, skip + count))
    if len(rows) < count:
        raise ValueError(f"{path.name}: {count} requests wanted after {skip}, it has {len(rows)}")
    times = [_timestamp(row["TIMESTAMP"]) for row in rows]
    return [
        Arrival(time - times[0], int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time, row in zip(times, rows, strict=True)
    ]


def synthetic_trace(count: int, seed: int = 1) -> list[Arrival]:
    """Return requests with the trace's statistics: log-normal lengths, gamma arrival gaps."""
    rng = random.Random(seed)
    shape = GAP_VARIATION**-2
    arrivals, at = [], 0.0
    for _ in range(count):
        prompt = rng.lognormvariate(PROMPT_LOG_MEAN, PROMPT_LOG_DEVIATION)
        output = rng.lognormvariate(OUTPUT_LOG_MEAN, OUTPUT_LOG_DEVIATION)
        arrivals.append(Arrival(at, _within(prompt, PROMPT_RANGE), _within(output, OUTPUT_RANGE)))
        at += rng.gammavariate(shape, 1 / shape)
    return arrivals


def rescale(arrivals: Sequence[Arrival], rate: float, length_factor: float) -> list[Arrival]:
    """Stretch the arrival gaps to `rate` requests per second and the lengths by a factor.

    Relative gaps, and so the trace's bursts, stay as they are. No length falls under one token.
    """
    span = arrivals[-1].at - arrivals[0].at if arrivals else 0.0
    last = (len(arrivals) - 1) / rate if span else 0.0
    return [
        Arrival(
            (arrival.at - arrivals[0].at) / (span or 1.0) * last,
            max(1, round(arrival.prompt_tokens * length_factor)),
            max(1, round(arrival.output_tokens * length_factor)),
        )
        for arrival in arrivals
    ]


def plan_requests(arrivals: Sequence[Arrival], mix: Mix) -> list[PlannedRequest]:
    """Return the workload: rescaled arrivals with random prompts, some behind a shared prefix.

    A prompt that would not fit the model's context together with its output is cut to fit.
    """
    rng = random.Random(mix.seed)
    system_prompt = _random_ids(rng, mix.system_prompt_tokens, mix.vocabulary)
    planned = []
    for index, arrival in enumerate(rescale(arrivals, mix.rate, mix.length_factor)):
        max_tokens = min(arrival.output_tokens, ceil(mix.max_model_len / 2))
        length = min(arrival.prompt_tokens, mix.max_model_len - max_tokens)
        prompt = _random_ids(rng, length, mix.vocabulary)
        shared = rng.random() < mix.shared_fraction and length > len(system_prompt) > 0
        if shared:
            prompt = system_prompt + prompt[len(system_prompt) :]
        planned.append(PlannedRequest(index, arrival.at, tuple(prompt), max_tokens, shared))
    return planned


def describe(planned: Sequence[PlannedRequest]) -> dict[str, float]:
    """Return what a reader wants to know of a workload."""
    prompts = [len(request.prompt) for request in planned]
    outputs = [request.max_tokens for request in planned]
    gaps = [later.at - earlier.at for earlier, later in pairwise(planned)]
    return {
        "requests": len(planned),
        "mean_prompt_tokens": sum(prompts) / len(prompts),
        "max_prompt_tokens": max(prompts),
        "mean_output_tokens": sum(outputs) / len(outputs),
        "max_output_tokens": max(outputs),
        "shared_fraction": sum(request.shared for request in planned) / len(planned),
        "mean_gap_seconds": sum(gaps) / len(gaps) if gaps else 0.0,
    }


def _timestamp(text: str) -> float:
    """Seconds of an ISO timestamp with up to seven decimals."""
    whole, _, decimals = text.partition(".")
    return datetime.fromisoformat(whole).timestamp() + float(f"0.{decimals or 0}")


def _within(value: float, bounds: tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], round(value)))


def _random_ids(rng: random.Random, count: int, vocabulary: tuple[int, int]) -> list[int]:
    return [rng.randrange(*vocabulary) for _ in range(count)]
