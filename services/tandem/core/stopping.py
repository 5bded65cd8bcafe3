"""When a sequence ends on account of its tokens. Stop strings are the gateway's, which owns the
text."""

from __future__ import annotations

from collections.abc import Collection

from tandem.core.request import FinishReason
from tandem.core.sequence import Sequence


def finish_reason(
    seq: Sequence, eos_token_ids: Collection[int], max_model_len: int
) -> FinishReason | None:
    """Return why the sequence ends with the token just appended, or None if it goes on.

    A token that stops counts before a length that is reached with it. `min_tokens` keeps
    tokens from stopping the sequence (the sampler does not draw them either); `ignore_eos` makes
    the model's end-of-sequence ids ordinary, but not `stop_token_ids`.
    """
    sampling = seq.request.sampling
    if seq.num_output_tokens >= 1 and seq.num_output_tokens >= sampling.min_tokens:
        last = seq.token_ids[-1]
        if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in eos_token_ids):
            return "stop"
    if seq.num_output_tokens >= sampling.max_tokens or seq.num_tokens >= max_model_len:
        return "length"
    return None
