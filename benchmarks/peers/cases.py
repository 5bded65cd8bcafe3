"""What every engine is asked, and what the times of its tokens say. Pure.

Greedy, random prompts that no one has seen before, two cores. Prefill: 1,024 prompt tokens over the
time to the first token. Decode: tokens per second after every request of the batch has its first,
context 128, 64 new tokens each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_TOKEN_ID = 300
"""Past special tokens and single bytes."""


@dataclass(frozen=True)
class Case:
    """One column of the table."""

    key: str
    title: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    aim: float | None = None
    """What Tandem's figure over the best peer's should be at least."""

    @property
    def is_prefill(self) -> bool:
        """Whether the prompt is what is measured."""
        return self.new_tokens == 1

    def prompts(self, vocab_size: int, turn: int, time: int = 0) -> list[list[int]]:
        """Return the prompts of one `time` in a turn, the same for every engine."""
        rng = random.Random(f"{self.key} {turn} {time}")
        return [
            [rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.batch)
        ]

    def speed(self, token_times: Sequence[Sequence[float]]) -> float:
        """Return tokens per second from the seconds at which every token came."""
        if self.is_prefill:
            return self.batch * self.prompt_tokens / max(times[0] for times in token_times)
        return decode_speed(token_times, self.new_tokens)


@dataclass(frozen=True)
class ModelCases:
    """One model with what is asked of it."""

    key: str
    title: str
    cases: tuple[Case, ...]
    times: int = 1
    """How often each is asked in one turn, of which the median counts."""


def _prefill(aim: float | None) -> Case:
    return Case("prefill", "prefill 1,024", 1, 1024, 1, aim)


def _decode(batch: int, aim: float | None) -> Case:
    return Case(f"decode_{batch}", f"decode, batch {batch}", batch, 128, 64, aim)


QWEN = ModelCases(
    "qwen",
    "Qwen2.5-0.5B shape, 494 M parameters, bfloat16",
    (_prefill(1.0), _decode(1, 1.15), _decode(8, 1.6), _decode(32, None)),
)
LLAMA = ModelCases(
    "llama-15m",
    "Llama shape of 15 M parameters, bfloat16",
    (_prefill(None), _decode(8, 3.0)),
    times=7,  # each takes some tens or hundreds of milliseconds
)
MODELS = (QWEN, LLAMA)


def decode_speed(token_times: Sequence[Sequence[float]], new_tokens: int) -> float:
    """Return tokens per second after all first tokens have come.

    A server that streams text may send fewer events than tokens: its events are scaled.
    """
    start = max(times[0] for times in token_times)
    end = max(times[-1] for times in token_times)
    if end <= start:
        raise ValueError("all tokens came at once: nothing is left to measure")
    later = sum(
        sum(moment > start for moment in times) * new_tokens / len(times) for times in token_times
    )
    return later / (end - start)


@dataclass(frozen=True)
class Ceilings:
    """What the machine could do at most, measured in the same run on the same cores."""

    read_bytes: float
    """Bytes per second that memory gives."""
    gemm_flops: float
    """Operations per second of a large bfloat16 matrix product."""

    def speed(self, case: Case, weight_bytes: float, layer_parameters: float) -> float:
        """Return the tokens per second of a case at the machine's speed.

        Prefill is bound by the products of its layers. A decode iteration reads all weights once
        and computes with them once per row.
        """
        if case.is_prefill:
            return self.gemm_flops / (2 * layer_parameters)
        by_memory = case.batch * self.read_bytes / weight_bytes
        return min(by_memory, self.gemm_flops / weight_bytes)  # 2 operations per 2-byte weight
