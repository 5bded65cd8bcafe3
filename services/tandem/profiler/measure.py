"""The measurement as a whole: which experiments, and the profile that they give.

What an iteration costs is measured between tokens, what a message costs by comparing prompts that
the decode worker computes itself with those that go to the prefill worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, median

from tandem.core.errors import ConfigError
from tandem.profiler.experiments import (
    MOST_STEPS,
    Batch,
    Prompts,
    decode_batch,
    lone_iterations,
)
from tandem.profiler.fit import Fit, FitError, Sample, fit_link, fit_samples
from tandem.profiler.machine import describe_machine, describe_versions, today
from tandem.profiler.stream import Stream, complete
from tandem.profiler.target import Done, Target
from tandem.scheduler import PoolRole
from tandem.simulator.profile import (
    IterationCost,
    LinkCost,
    Measured,
    Profile,
    SharedMachine,
)

Say = Callable[[str], None]
_PROMPTS = (8, 16, 32, 64, 128, 256, 512, 1024)
_BATCHES = ((1, 16), (2, 16), (4, 16), (8, 16), (16, 16), (1, 384), (4, 384))
"""(sequences, tokens of context) of the batches that decode."""
_REPEATS, _REPEATS_OF_LONG, _LONG = 5, 3, 256
_SIDE_PROMPT, _SIDE_PROMPTS, _SIDE_BATCH = 256, 4, (4, 16)
_JITTERS = 40


@dataclass
class Measurements:
    """What the experiments gave."""

    samples: list[Sample] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    wire: list[tuple[int, float, float]] = field(default_factory=list)
    """(pieces, bytes, seconds) of the KV of one prompt."""
    sent_tokens: int = 0
    remote: dict[int, float] = field(default_factory=dict)
    """TTFT of a prompt that the prefill worker computed, by its length."""


async def measure_profile(target: Target, name: str, say: Say) -> Profile:
    """Run every experiment on a cluster that does nothing else, and fit.

    Raises `UnavailableError` when the cluster stops answering, `FitError` when the measurements
    determine nothing, `ConfigError` when the cluster is too small to be measured.
    """
    prompts, found = Prompts(target.vocab_size), Measurements()
    await complete(target.endpoint, prompts.draw(_PROMPTS[2] + 1), 4)  # opens streams and links
    for length in _lengths(target):
        seconds = await lone_prompts(target, prompts, length, found)
        say(f"prompt of {length} tokens: {seconds * 1e3:.1f} ms to the first token")
    for size, context in _batches(target):
        batch = await _batch(target, prompts, size, context)
        found.batches.append(batch)
        found.samples.append(Sample(batch.mean, (batch.work,)))
        say(f"{size} sequences of {context} tokens: {batch.mean * 1e3:.2f} ms a step")
    fit = fit_samples(found.samples)
    shared = SharedMachine()
    if target.prefill is not None:
        shared = await _beside_each_other(target, prompts, found, fit)
        say(f"beside each other: prefill x{shared.prefill:.2f}, decode x{shared.decode:.2f}")
    return _profile(target, name, found, fit, shared)


def _lengths(target: Target) -> list[int]:
    """Prompts that fit the model, the blocks and the context."""
    most = min(target.max_model_len, target.decode.blocks_total * target.config.cache.block_size)
    lengths = [length for length in _PROMPTS if length + 2 <= most]
    if len(lengths) < 3:
        raise ConfigError(f"a sequence may have {most} tokens; a profile needs at least 34")
    return lengths


def _batches(target: Target) -> list[tuple[int, int]]:
    """Batches that the scheduler runs together and the blocks hold, with room to grow."""
    block_size, limit = target.config.cache.block_size, target.config.scheduler.max_running
    tokens = target.decode.blocks_total * block_size
    return [
        (size, context)
        for size, context in _BATCHES
        if size <= limit
        and size * (2 * context + 2 * MOST_STEPS) <= tokens
        and context + 2 * MOST_STEPS <= target.max_model_len
    ]


async def lone_prompts(target: Target, prompts: Prompts, length: int, found: Measurements) -> float:
    """Measure the way to the first token, and what its KV took on the wire; return the TTFT.

    Where a prompt is computed is the cluster's decision. One that both workers computed a part of
    tells nothing.
    """
    times: dict[PoolRole, list[float]] = {"prefill": [], "decode": []}
    works = {role: lone_iterations(target.config, role, length) for role in times}
    for _ in range(_REPEATS if length < _LONG else _REPEATS_OF_LONG):
        stream, done = await _complete_alone(target, prompts.draw(length))
        if not done.kv_bytes:
            times["decode"].append(stream.ttft)
        elif not done.computed:
            times["prefill"].append(stream.ttft)
            pieces = len(works["prefill"]) * target.layer_groups
            found.wire.append((pieces, done.kv_bytes, done.wire_seconds))
            found.sent_tokens += length
    measured = {role: median(series) for role, series in times.items() if series}
    if not measured:
        raise FitError(
            f"every prompt of {length} tokens moved from one worker to the other while it was "
            "computed: set lending.mode=off in the cluster that is measured"
        )
    for role, seconds in measured.items():
        messages = 0 if target.prefill is None else 4 if role == "prefill" else 2
        found.samples.append(Sample(seconds, works[role], requests=1, messages=messages))
    if "prefill" in measured:
        found.remote[length] = measured["prefill"]
    return min(measured.values())


async def _complete_alone(target: Target, prompt: list[int]) -> tuple[Stream, Done]:
    """Compute one prompt and return what the decode worker did for it."""
    before = await target.done()
    # With a prefill worker a second token comes only when all KV has landed.
    stream = await complete(target.endpoint, prompt, 1 if target.prefill is None else 2)
    return stream, (await target.done()).since(before)


async def _batch(target: Target, prompts: Prompts, size: int, context: int) -> Batch:
    drawn = [prompts.draw(context) for _ in range(size)]
    most = target.max_model_len - context - 1
    batch = await decode_batch(target.endpoint, drawn, most)
    await target.until_idle()
    return batch


async def _beside_each_other(
    target: Target, prompts: Prompts, found: Measurements, fit: Fit
) -> SharedMachine:
    """Measure how much longer iterations of one worker take while the other computes."""
    size, context = _SIDE_BATCH
    lengths = [length for length in found.remote if length <= _SIDE_PROMPT] or [*found.remote]
    if not lengths:
        raise FitError(
            "the decode worker computed every prompt itself, so nothing is known of the prefill "
            "worker: set lending.mode=off in the cluster that is measured"
        )
    length = max(lengths)
    times: list[float] = []

    async def compute_prompts() -> None:
        for prompt in [prompts.draw(length) for _ in range(_SIDE_PROMPTS)]:
            stream, done = await _complete_alone(target, prompt)
            if not done.computed:
                times.append(stream.ttft)

    drawn = [prompts.draw(context) for _ in range(size)]
    most = target.max_model_len - context - 1
    batch = await decode_batch(target.endpoint, drawn, most, compute_prompts)
    await target.until_idle()
    alone = fit.seconds(Sample(1.0, (batch.work,)))
    return SharedMachine(
        workers=2,
        prefill=max(1.0, fmean(times) / found.remote[length]) if times else 1.0,
        decode=max(1.0, batch.mean / alone),
    )


def _profile(
    target: Target, name: str, found: Measurements, fit: Fit, shared: SharedMachine
) -> Profile:
    costs = fit.costs
    link = None
    if found.wire:
        speed, latency = fit_link(found.wire)
        per_token = sum(size for _, size, _ in found.wire) / found.sent_tokens
        link = LinkCost(
            bytes_per_second=speed,
            latency=latency,
            kv_bytes_per_token=per_token,
            layer_groups=target.layer_groups,
        )
    iteration = {term: costs[term] for term in IterationCost.model_fields if term in costs}
    machine, versions = describe_machine(), describe_versions()
    return Profile(
        name=name,
        source=f"tandem profile on {machine['cpu']}, {target.decode.device}",
        iteration=IterationCost(**iteration, knee=fit.knee, jitter=_jitter(found.batches)),
        link=link,
        rpc_seconds=costs["rpc"],
        gateway_seconds=costs["gateway"],
        shared=shared,
        num_blocks=target.decode.blocks_total,
        max_model_len=target.max_model_len,
        measured=Measured(
            date=today(),
            machine=machine,
            versions=versions,
            model=target.endpoint.model,
            samples=len(found.samples),
            fit_error_p50=fit.error_p50,
            fit_error_max=fit.error_max,
        ),
    )


def _jitter(batches: list[Batch]) -> tuple[float, ...]:
    """Return equally likely deviations of a step from the mean of its batch, in seconds."""
    deviations = sorted(gap - batch.mean for batch in batches for gap in batch.gaps)
    count = min(_JITTERS, len(deviations))
    return tuple(
        deviations[(2 * index + 1) * len(deviations) // (2 * count)] for index in range(count)
    )
