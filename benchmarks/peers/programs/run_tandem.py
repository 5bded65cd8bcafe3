"""Tandem's engine in process, without scheduler, cluster or network: MODEL_DIRECTORY THREADS."""

import time
from itertools import count
from pathlib import Path

import torch
from protocol import Generate, serve

from tandem.controller.logs import configure_logging
from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine import Engine

BLOCK_SIZE = 16
NUM_BLOCKS = 1024
TOKENS_PER_ITERATION = 1024


def load(arguments: list[str]) -> tuple[str, Generate]:
    directory, threads = arguments
    configure_logging("warning")
    torch.set_num_threads(int(threads))
    cache = CacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    engine = Engine(Path(directory), ModelConfig(path=directory, dtype="bfloat16"), cache, "cpu")
    engine.warm_up()
    numbers = count()

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
        sequences = [_sequence(next(numbers), prompt, max_tokens) for prompt in prompts]
        _place(sequences, max_tokens)
        times: list[list[float]] = [[] for _ in sequences]
        for batch in _prompt_batches(sequences):
            chunks = tuple(ScheduledChunk(seq, 0, seq.num_tokens) for seq in batch)
            _run(engine, chunks, sequences, times)
        for _ in range(max_tokens - 1):
            chunks = tuple(ScheduledChunk(seq, seq.num_tokens - 1, 1) for seq in sequences)
            _run(engine, chunks, sequences, times)
        return times

    return f"Tandem's engine, {engine.kernels}", generate


def _sequence(number: int, prompt: list[int], max_tokens: int) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Sequence(Request(str(number), tuple(prompt), len(prompt), sampling), arrival=number)


def _place(sequences: list[Sequence], max_tokens: int) -> None:
    """Give every sequence blocks of its own for all its tokens."""
    first = 0
    for sequence in sequences:
        blocks = -(-(sequence.num_tokens + max_tokens) // BLOCK_SIZE)
        sequence.block_table = list(range(first, first + blocks))
        first += blocks
    if first > NUM_BLOCKS:
        raise ValueError(f"the batch needs {first} blocks, there are {NUM_BLOCKS}")


def _prompt_batches(sequences: list[Sequence]) -> list[list[Sequence]]:
    """Group whole prompts to at most TOKENS_PER_ITERATION tokens."""
    batches: list[list[Sequence]] = []
    room = 0
    for sequence in sequences:
        if sequence.num_tokens > room:
            batches.append([])
            room = TOKENS_PER_ITERATION
        batches[-1].append(sequence)
        room -= sequence.num_tokens
    return batches


def _run(
    engine: Engine,
    chunks: tuple[ScheduledChunk, ...],
    sequences: list[Sequence],
    times: list[list[float]],
) -> None:
    output = engine.run(IterationPlan(chunks))
    now = time.perf_counter()
    for sequence, moments in zip(sequences, times, strict=True):
        if sequence in output.tokens:
            sequence.token_ids.append(output.tokens[sequence].token_id)
            moments.append(now)


if __name__ == "__main__":
    serve(load)
