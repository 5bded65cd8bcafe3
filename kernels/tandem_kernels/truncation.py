"""Top-k, top-p and min-p: which tokens may be drawn at all.

Sources: Fan et al. (2018) for top-k; Holtzman et al. (2020) for top-p; Nguyen et al. (2024) for
min-p. In this order, each on the distribution that the one before it left, as `transformers`
applies them. Every rule becomes a lowest logit to keep, so tokens that tie with the last one kept
are kept too: what is kept does not depend on how a sort orders equals.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NUCLEUS = 128
"""Candidates that top-p looks at first; then eight times as many, for rows with mass elsewhere."""


def truncate_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    """Set the logits that are not kept to -inf in place.

    logits: float32 [rows, vocab], after temperature; top_k: int64 [rows], 0 is off; top_p: float64
    [rows], 1 is off; min_p: float32 [rows], 0 is off. At least the likeliest token of a row is
    kept.
    """
    lowest = torch.full_like(logits[:, 0], float("-inf"))
    sorts = (top_k > 0) | (top_p < 1.0)
    if bool(sorts.any()):
        rows = sorts.nonzero()[:, 0]
        lowest[rows] = _lowest_of_top(logits[rows], top_k[rows], top_p[rows])
    if bool((min_p > 0).any()):
        lowest = torch.maximum(lowest, logits.amax(1) + min_p.log())
    logits.masked_fill_(logits < lowest[:, None], float("-inf"))


def _lowest_of_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return the lowest logit, [rows], that top-k and then top-p keep."""
    vocab = logits.shape[1]
    open_ended = top_k == 0
    width = min(vocab, max(int(top_k.max()), _NUCLEUS if bool(open_ended.any()) else 1))
    lowest, covered = _cut(logits, top_k, top_p, width)
    short = (open_ended & ~covered).nonzero()[:, 0]
    while width < vocab and short.numel():
        width = min(vocab, 8 * width)
        lowest[short], covered = _cut(logits[short], top_k[short], top_p[short], width)
        short = short[~covered]
    return lowest


def _cut(logits: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Look at the `width` likeliest tokens; say too whether they hold a mass of top_p."""
    candidates = logits.topk(width, dim=1).values
    k = torch.where(top_k > 0, top_k, width)
    kept = torch.arange(width, device=logits.device) < k[:, None]
    candidates = candidates.masked_fill(~kept, float("-inf"))
    total = torch.where(top_k > 0, candidates.logsumexp(1), logits.logsumexp(1))
    # In float64 the sum over a large vocabulary keeps more digits than the tokens at its end have.
    probabilities = (candidates - total[:, None]).double().exp()
    mass = probabilities.cumsum(1)
    inside = (mass - probabilities < top_p[:, None]) | (top_p >= 1.0)[:, None]
    count = (inside & kept).sum(1).clamp_(min=1)
    lowest = candidates.gather(1, count[:, None] - 1)[:, 0]
    return lowest, mass[:, -1] >= top_p
