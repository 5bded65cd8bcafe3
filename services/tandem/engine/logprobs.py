"""Log-probabilities in the form that a request reports them.

They describe the model's own distribution: log-softmax of the raw logits, before temperature,
penalties, bias and truncation, as vLLM reports them by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap

import torch
from torch import Tensor

from tandem.core.request import PositionLogprobs, TokenLogprob
from tandem_kernels import top_logprobs


def position_logprobs(
    logits: Tensor, chosen: Sequence[int], counts: Sequence[int]
) -> list[PositionLogprobs]:
    """Report one position per row: its chosen token and the `counts[row]` likeliest.

    logits: float32 [rows, vocab], raw. The chosen token is among the likeliest where it belongs
    there.
    """
    chosen_ids = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
    return read_logprobs(top_logprobs(logits, chosen_ids, max(counts, default=0)), chosen, counts)


def read_logprobs(
    top: Sequence[Tensor], chosen: Sequence[int], counts: Sequence[int]
) -> list[PositionLogprobs]:
    """The same, from the tensors of a `TopLogprobs`."""
    columns = (tensor.tolist() for tensor in top)
    rows = zip(chosen, counts, *columns, strict=True)
    return [
        PositionLogprobs(
            TokenLogprob(token_id, own, rank),
            tuple(starmap(TokenLogprob, zip(ids[:count], logprobs, ranks, strict=False))),
        )
        for token_id, count, own, rank, ids, logprobs, ranks in rows
    ]
