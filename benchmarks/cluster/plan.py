"""The requests of a sweep: lengths of a real trace, Poisson arrivals, random prompts. Pure, but for
reading the lengths. The same arguments give the same requests, token for token."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.workload import PlannedRequest

LENGTHS = Path(__file__).parent.parent / "data" / "azure_2023_conversation_lengths.csv"
FIRST_TOKEN_ID = 300
"""Past special tokens and single bytes."""
SHORTEST_PROMPT, SHORTEST_OUTPUT = 4, 2


@dataclass(frozen=True)
class Sweep:
    """One load."""

    rate: float
    """Requests per second, on average."""
    seconds: float
    """Requests arrive this long; then the run goes on until all are answered."""
    length_factor: float = 0.25
    """A CPU is slower than the GPUs that the trace was served on."""
    longest_prompt: int = 3000
    vocab_size: int = 151936
    seed: int = 1


def read_lengths(path: Path = LENGTHS) -> list[tuple[int, int]]:
    """Return the (prompt, output) tokens of every request in the file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            (int(row["context_tokens"]), int(row["generated_tokens"]))
            for row in csv.DictReader(file)
        ]


def plan_arrivals(lengths: Sequence[tuple[int, int]], sweep: Sweep) -> list[PlannedRequest]:
    """Return the requests of one run, in order of arrival, lengths drawn with replacement."""
    rng = random.Random(f"{sweep.seed} {sweep.rate:g}")
    planned: list[PlannedRequest] = []
    at = rng.expovariate(sweep.rate)
    while at < sweep.seconds:
        context, generated = rng.choice(lengths)
        prompt = max(SHORTEST_PROMPT, round(context * sweep.length_factor))
        output = max(SHORTEST_OUTPUT, round(generated * sweep.length_factor))
        ids = random_prompt(rng, min(prompt, sweep.longest_prompt), sweep.vocab_size)
        planned.append(PlannedRequest(len(planned), at, ids, output, shared=False))
        at += rng.expovariate(sweep.rate)
    return planned


def plan_warm_up(sweep: Sweep, requests: int = 6) -> list[PlannedRequest]:
    """Return a batch of requests of growing length, unlike those of any run."""
    rng = random.Random(f"warm-up {sweep.seed}")
    return [
        PlannedRequest(
            index, 0.0, random_prompt(rng, 96 * (index + 1), sweep.vocab_size), 8, shared=False
        )
        for index in range(requests)
    ]


def random_prompt(rng: random.Random, length: int, vocab_size: int) -> tuple[int, ...]:
    """Return token ids that no prefix cache has seen."""
    return tuple(rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(length))
