"""Choosing one token per row from whole rows of logits: the likeliest, or a draw.

A `Choice` is one implementation of both. Here is the torch reference without truncation;
with it, see `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_kernels.gumbel import gumbel_noise


class Choice(NamedTuple):
    """What the sampler calls, with the signatures of `argmax` and `sample_tokens`."""

    argmax: Callable[[Tensor], Tensor]
    draw: Callable[..., Tensor]


def argmax(logits: Tensor) -> Tensor:
    """Return the likeliest token of each row, the lowest id among equals. logits: float32 [rows,
    vocab]."""
    return logits.argmax(1)


def draw(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Return int64 [rows]: the argmax of (logits - their maximum) / temperature + Gumbel noise.

    logits: float32 [rows, vocab]; temperatures: float32 [rows], above 0; seeds, positions: int64
    [rows], as in `gumbel_noise`. Only differences matter; taken from the maximum, no division can
    overflow.
    """
    scaled = logits - logits.amax(1, keepdim=True)
    scaled /= temperatures[:, None]
    vocab = torch.arange(logits.shape[1], device=logits.device)
    return scaled.add_(gumbel_noise(seeds, positions, vocab)).argmax(1)
