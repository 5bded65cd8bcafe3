"""What can never be served, however long it waits: refused at the door, with the reason."""

from __future__ import annotations

from tandem.core.errors import InvalidRequestError
from tandem.core.request import Request
from tandem.kvcache.block_pool import BlockPool

_CODE = "context_length_exceeded"


def check_fits(request: Request, pool: BlockPool, max_model_len: int) -> None:
    """Raise `InvalidRequestError` if the request could not finish with the whole pool."""
    _check_context(len(request.token_ids), max_model_len)
    most_tokens = min(request.max_len, max_model_len)
    needed = -(-most_tokens // pool.block_size)
    if needed > pool.num_blocks:
        raise InvalidRequestError(
            f"prompt and max_tokens make up to {most_tokens} tokens, which need {needed} KV "
            f"blocks of {pool.block_size} tokens; a worker has {pool.num_blocks}",
            param="max_tokens",
            code=_CODE,
        )


def check_admissible(num_tokens: int, pool: BlockPool, max_model_len: int) -> None:
    """Raise `InvalidRequestError` if a sequence of `num_tokens` could never leave the queue."""
    _check_context(num_tokens, max_model_len)
    needed = -(-(num_tokens + 1) // pool.block_size)
    if needed > pool.num_blocks:
        raise InvalidRequestError(
            f"{num_tokens} tokens and one more need {needed} KV blocks; this worker has "
            f"{pool.num_blocks}",
            code=_CODE,
        )


def _check_context(num_tokens: int, max_model_len: int) -> None:
    if num_tokens >= max_model_len:
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens, which leaves no room in the context of "
            f"{max_model_len} tokens",
            param="prompt",
            code=_CODE,
        )
