"""Token ids to text, one token at a time.

Invariant: what `push` and `flush` return, joined, is what `Tokenizer.decode` with `continuation`
returns for all ids at once; a character is given out when it is complete, never before. The cost of
a token depends on its own length only.
"""

from __future__ import annotations

import codecs

from tandem.gateway.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one stream of tokens that continues a prompt. Special tokens give no text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._whole_text = tokenizer.whole_text
        self._special_ids = tokenizer.special_ids
        self._separator = tokenizer.separator
        self._decoder = _Utf8Decoder(errors="replace")
        self._in_character = False

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token."""
        if not self._in_character and (whole := self._whole_text(token_id)) is not None:
            return whole
        if token_id in self._special_ids:
            return ""
        text = self._decoder.decode(self._separator + self._token_bytes(token_id))
        self._in_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """Return what an unfinished character at the end comes to: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)
