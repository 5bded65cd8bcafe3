"""Greedy tokens equal `transformers` in float32, however the work is cut up."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from tests.engine.conftest import TinyModel
from tests.engine.driver import Driver, greedy, make_engine, request

from tandem.core.sampling import SamplingParams
from tiny_models import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("kernels")

NEW_TOKENS = 16
PROMPT_LENGTHS = (1, 2, 7, 16, 33, 70, 150)
# (chunk size, block size, iterations between two requests)
CUTS = [(1, 4, 3), (7, 1, 5), (7, 16, 0), (16, 16, 2), (64, 4, 1), (64, 1, 0)]

Reference = Callable[[Path], tuple[transformers.PreTrainedModel, list[list[int]]]]


def prompt(length: int) -> list[int]:
    return [(31 * i * i + 7 * i + length) % 256 for i in range(length)]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Return the model in `transformers` and its greedy continuations of the prompts."""

    @cache
    def load(directory: Path) -> tuple[transformers.PreTrainedModel, list[list[int]]]:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        outputs = []
        for length in PROMPT_LENGTHS:
            ids = torch.tensor([prompt(length)])
            result = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            outputs.append(result[0, length:].tolist())
        return model, outputs

    return load


@pytest.mark.parametrize(("chunk_size", "block_size", "stagger"), CUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(
    tiny_model: TinyModel,
    reference: Reference,
    architecture: str,
    chunk_size: int,
    block_size: int,
    stagger: int,
) -> None:
    directory = tiny_model(architecture)
    _, expected = reference(directory)
    engine = make_engine(directory, block_size=block_size, num_blocks=512 // block_size)
    requests = [
        request(str(length), prompt(length), greedy(NEW_TOKENS)) for length in PROMPT_LENGTHS
    ]
    outputs = Driver(engine, chunk_size).run(requests, stagger)
    assert list(outputs.values()) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_varies(
    tiny_model: TinyModel, reference: Reference, architecture: str
) -> None:
    """Equality would say little about models that repeat one token."""
    _, expected = reference(tiny_model(architecture))
    assert len({token for output in expected for token in output}) > 20


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_equal_transformers(
    tiny_model: TinyModel, reference: Reference, architecture: str
) -> None:
    directory = tiny_model(architecture)
    model, _ = reference(directory)
    tokens = prompt(90)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=20)
    driver = Driver(make_engine(directory), chunk_size=32)
    driver.run([request("a", tokens, sampling)])
    positions = driver.prompt_logprobs["a"]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    for row, position in zip(expected, positions, strict=True):
        ids = [entry.token_id for entry in position.top]
        assert [entry.logprob for entry in position.top] == pytest.approx(
            row[ids].tolist(), abs=1e-4
        )
        assert [entry.logprob for entry in position.top] == pytest.approx(
            row.topk(20).values.tolist(), abs=1e-4
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.06), ("float16", 0.01)])
@pytest.mark.parametrize("architecture", ["llama3-rope", "mistral-window", "qwen2", "qwen3"])
def test_half_precision_stays_close(
    tiny_model: TinyModel, reference: Reference, architecture: str, dtype: str, tolerance: float
) -> None:
    directory = tiny_model(architecture)
    model, _ = reference(directory)
    tokens = prompt(60)
    sampling = SamplingParams(max_tokens=8, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    engine = make_engine(directory, dtype=dtype)
    driver = Driver(engine, chunk_size=16)
    output = driver.run([request("a", tokens, sampling)])["a"]
    assert len(output) == 8
    assert engine.storage.kv.dtype == getattr(torch, dtype)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    ours = torch.tensor([position.chosen.logprob for position in driver.prompt_logprobs["a"]])
    assert (ours - chosen).abs().mean() < tolerance
