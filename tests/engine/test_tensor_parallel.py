"""A model over several ranks: the greedy tokens of `transformers`, and the same bits every time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tests.engine.conftest import TinyModel
from tests.engine.driver import Driver, greedy, request
from torch import Tensor

from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.errors import ConfigError, UnavailableError
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.engine import Engine, load_spec
from tandem.engine.load import load_model
from tandem.engine.parallel.follower import Follower
from tandem.engine.parallel.group import ProcessRanks, open_ranks
from tandem.engine.parallel.shard import Shard, allowed_degrees, check_degree
from tandem.kvcache.heads import heads_of
from tandem_kernels import RaggedBatch

CACHE = CacheConfig(block_size=4, num_blocks=256)
FAMILIES = ["llama", "llama-biases", "llama-mha", "mistral-window", "qwen2-tied", "qwen3"]
LENGTHS = (1, 7, 33, 90)
NEW_TOKENS = 12


def prompt(length: int) -> list[int]:
    return [(31 * i * i + 7 * i + length) % 256 for i in range(length)]


class ThreadRanks:
    """Follower ranks in threads of this process; the announcer of rank 0."""

    def __init__(self, directory: Path, size: int, dtype: str) -> None:
        store = torch.distributed.HashStore()
        self.steps: list[queue.SimpleQueue[Callable[[Follower], None] | None]] = []
        self.threads: list[threading.Thread] = []
        self.errors: list[Exception] = []
        for rank in range(1, size):
            self.steps.append(queue.SimpleQueue())
            arguments = (directory, dtype, store, Shard(rank, size), self.steps[-1])
            self.threads.append(threading.Thread(target=self._follow, args=arguments))
            self.threads[-1].start()
        self.ranks = meet(store, Shard(0, size))

    def forward(self, token_ids: Tensor, batch: RaggedBatch, wanted_rows: Tensor | None) -> None:
        starts = np.array(batch.query_starts)
        lengths = np.diff(starts)
        first = np.array(batch.context_lens) - lengths
        tokens, tables = token_ids.numpy(), batch.block_tables.numpy()
        wanted = None if wanted_rows is None else wanted_rows.numpy()
        self._tell(lambda f: f.forward(tokens, first, lengths, tables, wanted, lambda layer: None))

    def logits(self, first_row: int, num_rows: int) -> None:
        self._tell(lambda follower: follower.logits(first_row, num_rows))

    def lost(self, error: Exception) -> None:
        self.errors.append(error)

    def stop(self) -> None:
        for steps in self.steps:
            steps.put(None)
        for thread in self.threads:
            thread.join(20)
        assert self.errors == []

    def _tell(self, step: Callable[[Follower], None]) -> None:
        for steps in self.steps:
            steps.put(step)

    def _follow(
        self,
        directory: Path,
        dtype: str,
        store: object,
        shard: Shard,
        steps: queue.SimpleQueue[Callable[[Follower], None] | None],
    ) -> None:
        try:
            ranks = meet(store, shard)
            model = ModelConfig(path=str(directory), dtype=dtype)  # type: ignore[arg-type]
            spec, device = load_spec(directory, model), torch.device("cpu")
            loaded = load_model(directory, model, CACHE, spec, device, ranks=ranks)
            follower = Follower(loaded.decoder, loaded.storage)
            while (step := steps.get()) is not None:
                step(follower)
        except Exception as error:
            self.errors.append(error)


def meet(store: object, shard: Shard) -> ProcessRanks:
    return open_ranks(store, shard, torch.device("cpu"), "127.0.0.1", timeout=20)


MakeParallel = Callable[..., Engine]


@pytest.fixture
def parallel() -> Iterator[MakeParallel]:
    """Makes rank 0 of an engine over several ranks."""
    started: list[ThreadRanks] = []

    def make(directory: Path, size: int, dtype: str = "float32") -> Engine:
        started.append(ThreadRanks(directory, size, dtype))
        model = ModelConfig(path=str(directory), dtype=dtype)  # type: ignore[arg-type]
        return Engine(directory, model, CACHE, "cpu", announcer=started[-1])

    yield make
    for ranks in started:
        ranks.stop()


def requests() -> list[Request]:
    return [request(str(length), prompt(length), greedy(NEW_TOKENS)) for length in LENGTHS]


def reference_tokens(directory: Path) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    outputs = []
    for length in LENGTHS:
        ids = torch.tensor([prompt(length)])
        result = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        outputs.append(result[0, length:].tolist())
    return outputs


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_greedy_tokens_equal_transformers(
    tiny_model: TinyModel, parallel: MakeParallel, architecture: str, size: int
) -> None:
    """With four ranks and two KV heads, two ranks share each of them."""
    directory = tiny_model(architecture)
    engine = parallel(directory, size)
    outputs = Driver(engine, chunk_size=16).run(requests(), stagger=2)
    assert list(outputs.values()) == reference_tokens(directory)


def logprobs(engine: Engine, tokens: Sequence[int], chunk_size: int) -> list[float]:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    driver = Driver(engine, chunk_size)
    driver.run([request("a", tokens, sampling)])
    return [position.chosen.logprob for position in driver.prompt_logprobs["a"]]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_degree_gives_the_same_bits_however_the_prompt_is_cut(
    tiny_model: TinyModel, parallel: MakeParallel, dtype: str
) -> None:
    directory = tiny_model("llama-mha")
    first = logprobs(parallel(directory, 4, dtype), prompt(90), chunk_size=64)
    again = logprobs(parallel(directory, 4, dtype), prompt(90), chunk_size=64)
    assert first == again


def test_an_element_is_summed_in_the_order_of_the_ranks_whatever_the_size() -> None:
    """1e8 + 1 - 1e8 is 0 or 1 in float32, by the order; a large tensor takes another road."""
    values = [1e8, 1.0, -1e8]
    expected = torch.tensor(1e8) + torch.tensor(1.0) + torch.tensor(-1e8)
    results: dict[int, list[Tensor]] = {}
    store = torch.distributed.HashStore()

    def run(rank: int) -> None:
        group = meet(store, Shard(rank, 3))
        shapes = [(1, 3), (7, 5), (900, 300)]
        results[rank] = [group.sum(torch.full(shape, values[rank])) for shape in shapes]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for sums in results.values():
        assert all(bool((total == expected).all()) for total in sums)
    assert len(results) == 3


def test_a_rank_that_never_comes_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="did not meet"):
        open_ranks(
            torch.distributed.HashStore(), Shard(0, 2), torch.device("cpu"), "127.0.0.1", 0.2
        )


def test_degrees_that_do_not_divide_are_refused_by_name(tiny_model: TinyModel) -> None:
    decoder = load_spec(tiny_model("llama"), ModelConfig()).decoder
    assert allowed_degrees(decoder) == (1, 2, 4)
    with pytest.raises(ConfigError) as refused:
        check_degree("decode.tensor_parallel", decoder, 3)
    assert refused.value.message == (
        "decode.tensor_parallel is 3; allowed for this model: 1, 2, 4 (4 heads do not divide by 3)"
    )


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_query_heads_find_their_kv_head_on_their_own_rank(size: int, kv_heads: int) -> None:
    heads = 8
    for rank in range(size):
        first, count = heads_of(rank, size, kv_heads)
        mine = range(rank * heads // size, (rank + 1) * heads // size)
        assert {head * kv_heads // heads for head in mine} == set(range(first, first + count))
