"""With the C++ kernels a sequence's log-probabilities keep their every bit, whatever the batch, the
chunks and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.engine.conftest import TinyModel
from tests.engine.driver import Driver, make_engine, request

from tandem.core.request import PositionLogprobs
from tandem.core.sampling import SamplingParams
from tandem.engine.models.compiled import CompiledModel
from tandem_kernels.cpu.library import load_library

pytestmark = pytest.mark.skipif(load_library() is None, reason="installed without a C++ compiler")

PROMPT = [(37 * i * i + 11 * i) % 256 for i in range(140)]
ASKING = SamplingParams(
    max_tokens=12, temperature=0.0, prompt_logprobs=2, logprobs=2, ignore_eos=True
)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def logprobs(
    tiny_model: TinyModel, architecture: str, dtype: str, chunk_size: int, others: int
) -> list[PositionLogprobs | None]:
    engine = make_engine(tiny_model(architecture), dtype=dtype, num_blocks=600)
    assert isinstance(engine._decoder, CompiledModel)
    driver = Driver(engine, chunk_size)
    neighbours = [request(f"other {i}", PROMPT[i : 20 + 9 * i], ASKING) for i in range(others)]
    driver.run([*neighbours, request("own", PROMPT, ASKING)], stagger=1)
    return [*driver.prompt_logprobs["own"], *driver.logprobs["own"]]


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "qwen2-tied", "qwen3-biases"])
def test_log_probabilities_keep_their_bits(
    tiny_model: TinyModel, architecture: str, dtype: str, threads: int
) -> None:
    expected = logprobs(tiny_model, architecture, dtype, chunk_size=200, others=0)
    assert len(expected) == len(PROMPT) - 1 + 12
    for chunk_size, others in ((1, 0), (33, 3), (140, 12)):
        assert logprobs(tiny_model, architecture, dtype, chunk_size, others) == expected
