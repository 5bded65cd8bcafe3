"""What an iteration gives back, and what it says while it runs."""

from __future__ import annotations

import pytest
import torch
from tests.engine.conftest import TinyModel
from tests.engine.driver import Driver, greedy, make_engine, request

from tandem.core.config import CacheConfig, ModelConfig
from tandem.core.errors import ConfigError
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import IterationPlan, ScheduledChunk, Sequence
from tandem.engine import Engine, IterationOutput, LayerGroup

pytestmark = pytest.mark.usefixtures("kernels")

PROMPTS = {"a": [3, 9, 27, 81], "b": list(range(40)), "c": [200], "d": list(range(90, 20, -1))}
SAMPLING = {
    "a": SamplingParams(max_tokens=12, seed=1, ignore_eos=True),
    "b": SamplingParams(max_tokens=12, seed=2, top_p=0.9, ignore_eos=True, logprobs=3),
    "c": SamplingParams(
        max_tokens=12, seed=3, repetition_penalty=1.2, frequency_penalty=0.5, ignore_eos=True
    ),
    "d": SamplingParams(max_tokens=12, temperature=0.0, presence_penalty=1.0, ignore_eos=True),
}


def sampled(
    engine: Engine, chunk_size: int, names: str, stagger: int = 0, emitted: int = 0
) -> dict[str, list[int]]:
    """Run the named requests; with `emitted`, resumed after so many tokens of `sampled` itself."""
    before = sampled(engine, chunk_size, names) if emitted else {}
    requests = [
        request(name, PROMPTS[name], SAMPLING[name], before.get(name, [])[:emitted])
        for name in names
    ]
    return Driver(engine, chunk_size).run(requests, stagger)


@pytest.fixture(scope="module")
def engine(tiny_model: TinyModel) -> Engine:
    return make_engine(tiny_model("qwen3"))


@pytest.mark.parametrize(
    ("chunk_size", "names", "stagger", "emitted"),
    [(1, "abcd", 0, 0), (7, "dcba", 3, 0), (64, "bd", 1, 0), (16, "abcd", 2, 5), (64, "ca", 0, 11)],
)
def test_sampled_tokens_do_not_depend_on_how_they_were_served(
    engine: Engine, chunk_size: int, names: str, stagger: int, emitted: int
) -> None:
    alone = {name: sampled(engine, 64, name)[name] for name in names}
    assert sampled(engine, chunk_size, names, stagger, emitted) == alone


def test_prompt_logprobs_do_not_depend_on_chunks(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=2, ignore_eos=True)
    other = request("other", PROMPTS["a"], greedy(3))
    results = []
    for chunk_size in (64, 7, 1):
        driver = Driver(engine, chunk_size)
        driver.run([request("b", PROMPTS["b"], sampling), other])
        assert set(driver.prompt_logprobs) == {"b"}
        results.append(driver.prompt_logprobs["b"])
    whole = results[0]
    assert [position.chosen.token_id for position in whole] == PROMPTS["b"][1:]
    for result in results[1:]:
        for expected, actual in zip(whole, result, strict=True):
            assert [entry.token_id for entry in actual.top] == [
                entry.token_id for entry in expected.top
            ]
            assert actual.chosen.rank == expected.chosen.rank
            assert actual.chosen.logprob == pytest.approx(expected.chosen.logprob, abs=1e-4)


def test_prompt_logprobs_of_a_resumed_request_end_with_the_prompt(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    driver = Driver(engine, chunk_size=16)
    driver.run([request("b", PROMPTS["b"], sampling, emitted=[1, 2])])
    chosen = [position.chosen.token_id for position in driver.prompt_logprobs["b"]]
    assert chosen == PROMPTS["b"][1:]


def test_logprobs_come_with_the_tokens_that_ask_for_them(engine: Engine) -> None:
    driver = Driver(engine, chunk_size=16)
    output = driver.run([request(name, PROMPTS[name], SAMPLING[name]) for name in "ab"])
    assert driver.logprobs["a"] == [None] * 12
    positions = driver.logprobs["b"]
    assert [position.chosen.token_id for position in positions if position] == output["b"]
    assert all(position and len(position.top) == 3 for position in positions)


@pytest.mark.parametrize(
    ("layers_per_group", "groups"),
    [(0, [(0, 1), (1, 1), (2, 1)]), (2, [(0, 2), (2, 1)]), (3, [(0, 3)]), (9, [(0, 3)])],
)
def test_layer_groups_are_announced_once_their_kv_is_written(
    tiny_model: TinyModel, layers_per_group: int, groups: list[tuple[int, int]]
) -> None:
    directory = tiny_model("llama")
    cache = CacheConfig(num_blocks=8, block_size=4)
    model = ModelConfig(path=str(directory))
    engine = Engine(directory, model, cache, "cpu", layers_per_group)
    seq = Sequence(request("a", list(range(20)), greedy(1)), arrival=0, block_table=[5, 1, 7, 0, 2])
    slots = engine.storage.slots(seq.block_table, 0, 9)
    seen: list[tuple[int, int]] = []

    def on_layers(group: LayerGroup) -> None:
        assert group.ready is None
        seen.append((group.first_layer, group.num_layers))
        end = group.first_layer + group.num_layers
        packed = engine.storage.pack(0, end, slots)
        assert packed.abs().amin((3, 4)).all()
        assert not packed.is_inference()  # or no other thread could fill it again
        assert not engine.storage.kv[end:].any()

    output = engine.run(IterationPlan((ScheduledChunk(seq, 0, 9),)), on_layers)
    assert seen == groups
    assert output == IterationOutput()
    untouched = engine.storage.slots(seq.block_table, 9, 20)
    assert not engine.storage.pack(0, 3, untouched).any()


def test_kv_from_another_engine_continues_the_prompt(tiny_model: TinyModel) -> None:
    """What a hand-over does: KV packed here, scattered there, under another block table."""
    directory = tiny_model("mistral-window")
    first, second = make_engine(directory), make_engine(directory, block_size=4)
    prompt = PROMPTS["d"]
    expected = Driver(make_engine(directory), 64).run([request("d", prompt, greedy(6))])["d"]
    sender = Sequence(request("d", prompt, greedy(6)), 0, block_table=list(range(30, 50)))
    receiver = Sequence(request("d", prompt, greedy(6)), 0, block_table=list(range(25, 2, -1)))
    length = len(prompt)
    output = first.run(IterationPlan((ScheduledChunk(sender, 0, length),)))
    packed = first.storage.pack(0, 3, first.storage.slots(sender.block_table, 0, length))
    second.storage.unpack(
        0, 3, second.storage.slots(receiver.block_table, 0, length), packed.clone()
    )
    receiver.token_ids.append(output.tokens[sender].token_id)
    for _ in range(5):
        chunk = ScheduledChunk(receiver, receiver.num_tokens - 1, 1)
        token = second.run(IterationPlan((chunk,))).tokens[receiver]
        receiver.token_ids.append(token.token_id)
    assert receiver.token_ids[length:] == expected


def test_an_empty_plan_gives_nothing(engine: Engine) -> None:
    assert engine.run(IterationPlan(())) == IterationOutput()


def test_blocks_follow_from_memory(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    cache = CacheConfig(memory_bytes=2**20, block_size=16)
    engine = Engine(directory, ModelConfig(path=str(directory)), cache, "cpu")
    assert engine.num_blocks == engine.storage.num_blocks == 2**20 // (16 * 2 * 3 * 2 * 8 * 4 + 64)
    assert engine.storage.memory.nbytes <= 2**20


def test_too_little_memory_for_a_block_is_refused(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama")
    cache = CacheConfig(memory_bytes=2**20, block_size=256).model_copy(
        update={"memory_bytes": 1000}
    )
    with pytest.raises(ConfigError, match=r"memory_bytes is 1000; allowed: at least 98368"):
        Engine(directory, ModelConfig(path=str(directory)), cache, "cpu")


@pytest.mark.parametrize("num_blocks", [1, 2, 100])
def test_warm_up_reports_progress_and_leaves_answers_alone(
    tiny_model: TinyModel, num_blocks: int
) -> None:
    directory = tiny_model("llama")
    reported: list[tuple[str, float]] = []
    engine = Engine(
        directory,
        ModelConfig(path=str(directory)),
        CacheConfig(num_blocks=num_blocks, block_size=4),
        "cpu",
        progress=lambda stage, done: reported.append((stage, done)),
    )
    engine.warm_up()
    loading = [done for stage, done in reported if stage.startswith("loading weights")]
    warming = [done for stage, done in reported if stage == "warming up"]
    assert loading == sorted(loading)
    assert (loading[-1], warming[-1]) == (1.0, 1.0)
    expected = Driver(make_engine(directory), 4).run([request("a", PROMPTS["c"], greedy(3))])
    assert Driver(engine, 4).run([request("a", PROMPTS["c"], greedy(3))]) == expected
    assert engine.storage.kv.dtype == torch.float32
