"""Log-probability and rank of chosen tokens, and the likeliest alternatives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopLogprobs(NamedTuple):
    """One row per position. Rank 1 is the likeliest; tokens that tie share a rank."""

    chosen: Tensor
    """float32 [rows]"""
    chosen_rank: Tensor
    """int64 [rows]"""
    token_ids: Tensor
    """int64 [rows, count], likeliest first"""
    logprobs: Tensor
    """float32 [rows, count]"""
    ranks: Tensor
    """int64 [rows, count]"""


def top_logprobs(logits: Tensor, chosen: Tensor, count: int) -> TopLogprobs:
    """logits: float32 [rows, vocab]; chosen: int64 [rows] token ids; count: alternatives per
    row."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, chosen[:, None])
    top, token_ids = logprobs.topk(min(count, logits.shape[1]), dim=1)
    return TopLogprobs(
        chosen=own[:, 0],
        chosen_rank=(logprobs > own).sum(1) + 1,
        token_ids=token_ids,
        logprobs=top,
        ranks=(top[:, None, :] > top[:, :, None]).sum(2) + 1,
    )
