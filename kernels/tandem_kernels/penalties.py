"""Repetition, presence and frequency penalties on the logits of tokens that a sequence holds.

Source: Keskar et al., "CTRL" (2019) for repetition; OpenAI's API reference for presence and
frequency. Works on the few tokens that occur, not on the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_penalties(
    logits: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Change logits, float32 [rows, vocab], in place.

    token_ids: int64 [rows, n], the tokens of each row's prompt and output; a row is filled up by
    repeating one of its own entries. output_counts: int64 [rows, n], how often the token is in the
    output. repetition, presence, frequency: float32 [rows]; 1, 0 and 0 change nothing.
    """
    scores = logits.gather(1, token_ids)
    factor = repetition[:, None]
    scores = torch.where(scores > 0, scores / factor, scores * factor)
    scores -= frequency[:, None] * output_counts
    scores -= presence[:, None] * (output_counts > 0)
    logits.scatter_(1, token_ids, scores)
