"""Drawing a token per row: temperature, truncation where there is one, then Gumbel-max."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem_kernels.choice import Choice, argmax, draw
from tandem_kernels.gumbel import gumbel_noise
from tandem_kernels.truncation import truncate_logits


def sample_tokens(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """Return int64 [rows]: argmax of the truncated logits / temperature + noise.

    logits: float32 [rows, vocab], left unchanged; temperatures: float32 [rows], above 0; seeds,
    positions: as for `gumbel_noise`. The other three as for `truncate_logits`, all or none of them.
    """
    if top_k is None or top_p is None or min_p is None:
        return draw(logits, temperatures, seeds, positions)
    scaled = logits - logits.amax(1, keepdim=True)
    scaled /= temperatures[:, None]
    truncate_logits(scaled, top_k, top_p, min_p)
    # Few tokens are left as a rule: only those get noise.
    rows, token_ids = torch.isfinite(scaled).nonzero(as_tuple=True)
    noise = gumbel_noise(seeds[rows], positions[rows], token_ids[:, None])
    scaled[rows, token_ids] += noise[:, 0]
    return scaled.argmax(1)


REFERENCE_CHOICE = Choice(argmax, sample_tokens)
