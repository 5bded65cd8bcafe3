"""Truncation, penalties and log-probabilities against `transformers` and plain formulas."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from torch import Tensor

from tandem_kernels import apply_penalties, top_logprobs, truncate_logits


def random_logits(rows: int, vocab: int, spread: float = 3.0) -> Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(vocab)) * spread


def truncated(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    rows = len(logits)
    result = logits.clone()
    truncate_logits(
        result,
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.full((rows,), min_p),
    )
    return result


def in_transformers(
    logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    ids = torch.zeros((len(logits), 1), dtype=torch.int64)
    if top_k:
        logits = transformers.TopKLogitsWarper(top_k)(ids, logits)
    if top_p < 1.0:
        logits = transformers.TopPLogitsWarper(top_p)(ids, logits)
    if min_p > 0.0:
        logits = transformers.MinPLogitsWarper(min_p)(ids, logits)
    return logits


@pytest.mark.parametrize("vocab", [50, 3000])
@pytest.mark.parametrize(
    "rule",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10_000},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 0.99},
        {"min_p": 0.001},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
def test_truncation_equals_transformers(vocab: int, rule: dict[str, float]) -> None:
    logits = random_logits(8, vocab)
    expected = in_transformers(logits.double(), **rule).float()  # type: ignore[arg-type]
    assert torch.equal(truncated(logits, **rule), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_top_p_of_a_flat_distribution_looks_further(top_p: float) -> None:
    """The mass lies in far more tokens than top-p looks at first."""
    logits = random_logits(3, 9000, spread=0.1)
    kept = truncated(logits, top_p=top_p)
    assert torch.equal(kept, in_transformers(logits.double(), top_p=top_p).float())
    assert (kept.isfinite().sum(1) > 1024).all()


def test_each_row_has_its_own_rules() -> None:
    logits = random_logits(1, 2000).expand(5, -1).clone()
    rules = [{}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.2}, {"top_k": 50, "top_p": 0.7}]
    top_k = torch.tensor([int(rule.get("top_k", 0)) for rule in rules])
    top_p = torch.tensor([rule.get("top_p", 1.0) for rule in rules], dtype=torch.float64)
    min_p = torch.tensor([rule.get("min_p", 0.0) for rule in rules])
    alone = [truncated(logits[:1], **rule)[0] for rule in rules]  # type: ignore[arg-type]
    truncate_logits(logits, top_k, top_p, min_p)
    assert torch.equal(logits, torch.stack(alone))
    assert torch.equal(logits[0], alone[0])


def test_ties_with_the_last_token_kept_are_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]])
    kept = truncated(logits, top_k=3)
    assert kept.isfinite().tolist() == [[True, True, True, True, True]]
    assert truncated(logits, top_k=2).isfinite().tolist() == [[False, True, False, True, False]]


def test_forbidden_tokens_stay_forbidden() -> None:
    logits = torch.full((1, 40), float("-inf"))
    logits[0, 5] = -3.0
    for rule in ({"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.5}):
        kept = truncated(logits, **rule)  # type: ignore[arg-type]
        assert kept.isfinite().nonzero().tolist() == [[0, 5]]


def penalised(
    logits: Tensor, prompt: list[int], output: list[int], r: float, p: float, f: float
) -> Tensor:
    counts = Counter(output)
    ids = sorted({*prompt, *output})
    ids += ids[:1] * 3  # padding, as the token counts add it
    result = logits.clone()
    apply_penalties(
        result,
        torch.tensor([ids]),
        torch.tensor([[counts[i] for i in ids]]),
        *(torch.tensor([value]) for value in (r, p, f)),
    )
    return result


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits, prompt, output = random_logits(1, 60), [3, 9, 9, 40], [9, 17, 17]
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([prompt + output]), logits)
    torch.testing.assert_close(penalised(logits, prompt, output, penalty, 0.0, 0.0), expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits, prompt, output = random_logits(1, 60), [3, 9, 9, 40], [9, 17, 17]
    expected = logits.clone()
    expected[0, 9] -= 0.7 + 0.4 * 1
    expected[0, 17] -= 0.7 + 0.4 * 2
    torch.testing.assert_close(penalised(logits, prompt, output, 1.0, 0.7, 0.4), expected)


def test_top_logprobs() -> None:
    logits = random_logits(4, 30)
    chosen = torch.tensor([int(logits[0].argmax()), 3, 29, int(logits[3].argmin())])
    result = top_logprobs(logits, chosen, 5)
    exact = logits.double().log_softmax(-1)
    order = exact.argsort(dim=1, descending=True)
    torch.testing.assert_close(
        result.chosen.double(), exact.gather(1, chosen[:, None])[:, 0], atol=1e-5, rtol=0
    )
    ranks = [order[row].tolist().index(int(token)) + 1 for row, token in enumerate(chosen)]
    assert result.chosen_rank.tolist() == ranks
    assert ranks[0] == 1
    assert ranks[3] == 30
    assert torch.equal(result.token_ids, order[:, :5])
    assert result.ranks.tolist() == [[1, 2, 3, 4, 5]] * 4


def test_tied_tokens_share_a_rank() -> None:
    result = top_logprobs(torch.tensor([[2.0, 5.0, 2.0, 2.0, 1.0]]), torch.tensor([3]), 5)
    assert result.chosen_rank.tolist() == [2]
    assert result.ranks.tolist() == [[1, 2, 2, 2, 5]]
