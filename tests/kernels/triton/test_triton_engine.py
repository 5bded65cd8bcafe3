"""An engine on Triton kernels writes the same tokens as one on the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.engine.driver import Driver, greedy, make_engine, request

from tandem.core.sampling import SamplingParams
from tandem_kernels.implementation import ENVIRONMENT_VARIABLE, implementation, operations
from tiny_models import make_tiny_model

PROMPT_LENGTHS = (1, 7, 33, 18)
SAMPLED = SamplingParams(max_tokens=4, temperature=0.9, top_k=40, top_p=0.95, seed=11)
Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Switch the whole process to one implementation."""

    def switch(name: str) -> None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
        operations.cache_clear()

    yield switch
    monkeypatch.undo()
    operations.cache_clear()


def prompt(length: int) -> list[int]:
    return [(31 * i * i + 7 * i + length) % 256 for i in range(length)]


@pytest.mark.parametrize("architecture", ["llama3-rope", "mistral-window", "qwen3-biases"])
def test_tokens_equal_the_reference(architecture: str, tmp_path: Path, use: Use) -> None:
    directory = make_tiny_model(architecture, tmp_path)
    requests = [request(str(n), prompt(n), greedy(4)) for n in PROMPT_LENGTHS]
    requests.append(request("sampled", prompt(9), SAMPLED))
    requests.append(
        request("plain", prompt(5), SamplingParams(max_tokens=4, temperature=1.0, seed=3))
    )
    outputs = []
    for name in ("reference", "triton"):
        use(name)
        assert ("Triton" in implementation("cpu")) == (name == "triton")
        outputs.append(Driver(make_engine(directory), chunk_size=16).run(requests, stagger=2))
    assert outputs[0] == outputs[1]


def test_padded_decode_batches_change_nothing(tmp_path: Path, use: Use) -> None:
    """What CUDA graphs replay, run without capturing: static buffers, padded rows, contexts that
    grow, sequences that come and go."""
    directory = make_tiny_model("mistral-window", tmp_path)
    requests = [request(str(n), prompt(n), greedy(6)) for n in PROMPT_LENGTHS]
    use("reference")
    expected = Driver(make_engine(directory), chunk_size=16).run(requests, stagger=2)
    use("triton")
    engine = make_engine(directory)
    assert engine.device.type == "cpu"
    engine.capture_decode(sizes=(1, 3, 8))
    assert Driver(engine, chunk_size=16).run(requests, stagger=2) == expected
    written = (engine.storage.kv != 0).flatten(2, 3).any(-1).any(-1)[0, 0].sum()
    assert int(written) <= sum(PROMPT_LENGTHS) + 5 * len(PROMPT_LENGTHS)  # blocks are used again
