"""Log-probabilities in the shapes of both OpenAI APIs, and of the `prompt_logprobs` extension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tandem.core.request import PositionLogprobs, TokenLogprob
from tandem.gateway.text.detokenizer import IncrementalDetokenizer
from tandem.gateway.text.tokenizer import Tokenizer

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def chat_logprobs(tokenizer: Tokenizer, positions: Sequence[PositionLogprobs]) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice or chunk."""
    content = [
        {
            **_chat_token(tokenizer, position.chosen),
            "top_logprobs": [_chat_token(tokenizer, token) for token in position.top],
        }
        for position in positions
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer, positions: Sequence[PositionLogprobs | None] | None
) -> list[dict[str, Any] | None] | None:
    """Return one entry per prompt token, by token id; null for the first."""
    if positions is None:
        return None
    return [position and _by_token_id(tokenizer, position) for position in positions]


class CompletionLogprobs:
    """Makes the `logprobs` of one completion choice, chunk by chunk: offsets run on."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        """`offset` is where the first token's text begins in the text of the choice."""
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._offset = offset

    def chunk(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]
    ) -> dict[str, Any]:
        """Return the entry for the next tokens; a position is None for a prompt's first token."""
        offsets = []
        for token_id in token_ids:
            offsets.append(max(0, self._offset))
            self._offset += len(self._detokenizer.push(token_id))
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in token_ids],
            "token_logprobs": [p and _finite(p.chosen.logprob) for p in positions],
            "top_logprobs": [p and self._top(p) for p in positions],
            "text_offset": offsets,
        }

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        tokens = (*position.top, position.chosen)
        text = self._tokenizer.token_text
        return {text(token.token_id): _finite(token.logprob) for token in tokens}


def _chat_token(tokenizer: Tokenizer, token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token.token_id),
        "logprob": _finite(token.logprob),
        "bytes": list(tokenizer.token_bytes(token.token_id)),
    }


def _by_token_id(tokenizer: Tokenizer, position: PositionLogprobs) -> dict[str, Any]:
    return {
        str(token.token_id): {
            "logprob": _finite(token.logprob),
            "rank": token.rank,
            "decoded_token": tokenizer.token_text(token.token_id),
        }
        for token in (position.chosen, *position.top)
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
