"""Draws follow the distribution that the parameters describe, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.core.request import Request, SampledToken
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.engine.batch_state import BatchState
from tandem.engine.sampler import Sampler

VOCAB = 24
EOS = (5, 6)


def make_sequence(
    prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **sampling: Any
) -> Sequence:
    params = SamplingParams(**{"max_tokens": 100, **sampling})
    return Sequence(Request("a", prompt + output, len(prompt), params), arrival=0)


def make_logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * 2


def make_state() -> BatchState:
    return BatchState(EOS, torch.device("cpu"))


def sample(state: BatchState, logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    positions = np.array([seq.num_tokens for seq in sequences], dtype=np.int64)
    columns = state.columns(sequences, state.enter(sequences), positions)
    return Sampler().draw(logits, columns).read()


def draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    return [token.token_id for token in sample(make_state(), logits, sequences)]


def assert_distributed(tokens: list[int], probabilities: Tensor) -> None:
    """Pearson's chi-square test, rare tokens pooled; those that may not occur must not."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    allowed = probabilities > 0
    assert not counts[~allowed].any()
    expected = probabilities[allowed].double() * len(tokens)
    bins = torch.where(expected < 5, len(expected), torch.arange(len(expected)))
    observed = torch.zeros(len(expected) + 1, dtype=torch.float64).index_add(
        0, bins, counts[allowed]
    )
    pooled = torch.zeros(len(expected) + 1, dtype=torch.float64).index_add(0, bins, expected)
    used = pooled > 0
    statistic = ((observed[used] - pooled[used]).square() / pooled[used]).sum()
    freedom = int(used.sum()) - 1
    assert freedom >= 1
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2)
    assert p_value > 1e-3


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"logit_bias": {3: 2.0, 4: -100.0}},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling: dict[str, Any]) -> None:
    logits = make_logits()
    prompt, output = (7, 8, 9, 9), (9, 10, 10)
    sequences = [make_sequence(prompt, output, seed=seed, **sampling) for seed in range(20_000)]
    tokens = draw(logits.expand(len(sequences), -1), sequences)

    adjusted = logits[0].double()
    for token_id, bias in sampling.get("logit_bias", {}).items():
        adjusted[token_id] += bias
    if "repetition_penalty" in sampling:
        for token_id in {*prompt, *output}:
            score = adjusted[token_id]
            adjusted[token_id] = score / 1.5 if score > 0 else score * 1.5
        for token_id in set(output):
            adjusted[token_id] -= 0.5 + 0.25 * output.count(token_id)
    assert_distributed(tokens, expected_probabilities(adjusted, sampling))


def expected_probabilities(logits: Tensor, sampling: dict[str, Any]) -> Tensor:
    """Temperature, top-k, top-p and min-p by their definitions."""
    probabilities = (logits / sampling.get("temperature", 1.0)).softmax(-1)
    order = probabilities.argsort(descending=True)
    if "top_k" in sampling:
        probabilities[order[sampling["top_k"] :]] = 0
        probabilities /= probabilities.sum()
    if "top_p" in sampling:
        before = probabilities[order].cumsum(0) - probabilities[order]
        probabilities[order[before >= sampling["top_p"]]] = 0
    if "min_p" in sampling:
        probabilities[probabilities < sampling["min_p"] * probabilities.max()] = 0
    probabilities[probabilities < 1e-12] = 0
    return probabilities / probabilities.sum()


def test_draws_along_a_sequence_follow_the_distribution() -> None:
    """One seed, thousands of positions: what one long answer draws."""
    logits = make_logits()
    sequences = [make_sequence((1,) * length, seed=3) for length in range(1, 4001)]
    tokens = draw(logits.expand(len(sequences), -1), sequences)
    assert_distributed(tokens, logits[0].double().softmax(-1))


MIXTURE: list[dict[str, Any]] = [
    {"seed": 1},
    {"temperature": 0.0},
    {"seed": 2, "top_k": 3},
    {"seed": 3, "top_p": 0.5},
    {"seed": 2**64 - 1, "min_p": 0.2},
    {"temperature": 0.0, "repetition_penalty": 1.7},
    {"seed": 4, "presence_penalty": 1.0, "logprobs": 2},
    {"seed": 5, "frequency_penalty": -1.0, "logit_bias": {4: 3.0}},
    {"seed": 6, "min_tokens": 9},
    {"temperature": 0.0, "logprobs": 0},
]


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits = make_logits(len(MIXTURE), vocab=3000)
    sequences = [
        make_sequence((row, 4, 9), (9, row), **sampling) for row, sampling in enumerate(MIXTURE)
    ]
    state = make_state()
    together = sample(state, logits, sequences)
    for rows in ([4], [0, 9, 2], [7, 6, 5], list(reversed(range(len(MIXTURE))))):
        part = sample(state, logits[rows], [sequences[row] for row in rows])
        assert [token.token_id for token in part] == [together[row].token_id for row in rows]


def test_logits_are_left_unchanged() -> None:
    logits = make_logits(len(MIXTURE))
    before = logits.clone()
    draw(logits, [make_sequence(**sampling) for sampling in MIXTURE])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9, 1e-7])
def test_no_temperature_is_the_likeliest_token(temperature: float) -> None:
    logits = make_logits(50) * 1000
    sequences = [make_sequence(temperature=temperature, seed=row) for row in range(50)]
    assert draw(logits, sequences) == logits.argmax(1).tolist()


def test_min_tokens_forbids_whatever_could_stop() -> None:
    logits = torch.zeros((1, VOCAB))
    logits[0, [*EOS, 7]] = 50.0
    logits[0, 8] = 1.0
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (7,)}
    for ignore_eos in (False, True):
        assert draw(logits, [make_sequence(output=(9,), ignore_eos=ignore_eos, **params)]) == [8]
    assert draw(logits, [make_sequence(output=(9, 9), **params)]) == [EOS[0]]


def test_whole_numbers_are_numbers() -> None:
    """A client's JSON may say 1 where it means 1.0."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0]])
    seq = make_sequence(temperature=1, top_p=1, min_p=1, presence_penalty=2, logit_bias={0: 9})
    assert draw(logits, [seq]) == [0]


def test_bias_comes_before_penalties() -> None:
    """As in vLLM: a biased score is what the repetition penalty divides."""
    logits = torch.tensor([[1.0, 3.0, 0.0]])
    biased = make_sequence((0,), temperature=0.0, logit_bias={0: 4.0}, repetition_penalty=2.0)
    # (1 + 4) / 2 is less than 3; a bias after the penalty would make it 1 / 2 + 4
    assert draw(logits, [biased]) == [1]


def test_penalties_follow_a_sequence_as_it_grows() -> None:
    """The kept counts equal those of a sequence that is counted afresh."""
    sampling: dict[str, Any] = {
        "temperature": 0.0,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.2,
    }
    logits = make_logits(1, vocab=200, seed=3)
    state = make_state()
    seq = make_sequence(**sampling)
    for _ in range(300):
        (token,) = sample(state, logits, [seq])
        fresh = make_sequence(output=tuple(seq.token_ids[3:]), **sampling)
        assert draw(logits, [fresh]) == [token.token_id]
        seq.token_ids.append(token.token_id)
    assert len(set(seq.token_ids)) > 64  # more than the counts first have room for


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = make_logits(3)
    changed = {"temperature": 0.5, "top_k": 2, "repetition_penalty": 1.5, "logit_bias": {1: 5.0}}
    sequences = [
        make_sequence(seed=1, logprobs=4, **changed),
        make_sequence(seed=2),
        make_sequence(temperature=0.0, logprobs=0),
    ]
    first, second, third = sample(make_state(), logits, sequences)
    exact = logits.double().log_softmax(-1)
    order = exact.argsort(dim=1, descending=True).tolist()
    assert first.logprobs is not None
    assert first.logprobs.chosen.token_id == first.token_id
    assert first.logprobs.chosen.rank == order[0].index(first.token_id) + 1
    assert first.logprobs.chosen.logprob == pytest.approx(float(exact[0, first.token_id]), abs=1e-5)
    assert [entry.token_id for entry in first.logprobs.top] == order[0][:4]
    assert [entry.rank for entry in first.logprobs.top] == [1, 2, 3, 4]
    assert [entry.logprob for entry in first.logprobs.top] == pytest.approx(
        exact[0, order[0][:4]].tolist(), abs=1e-5
    )
    assert second.logprobs is None
    assert third.logprobs is not None
    assert third.logprobs.chosen.rank == 1
    assert third.logprobs.top == ()
