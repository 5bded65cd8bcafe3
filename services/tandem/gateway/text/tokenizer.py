"""A model's tokenizer: text to token ids, token ids to bytes and text.

Reads `tokenizer.json`, and the names of the special tokens from `tokenizer_config.json` or
`special_tokens_map.json`. No chat template and no streaming state here. Immutable after loading, so
that any thread may use it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from tandem.core.errors import InvalidRequestError, ModelLoadError
from tandem.gateway.text.pieces import PieceDecoder, piece_decoder
from tandem.modelfiles import read_json

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Encodes and decodes for one model."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        decoder: PieceDecoder,
        named_tokens: Mapping[str, str],
        *,
        add_bos_token: bool = False,
    ) -> None:
        self._backend = backend
        self._decoder = decoder
        self.named_tokens = dict(named_tokens)
        """Such as `bos_token`: as chat templates refer to them."""
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        """Control tokens, which are not part of the text."""
        bos = self.named_tokens.get("bos_token")
        self._forced_bos = backend.token_to_id(bos) if add_bos_token and bos else None
        self._pieces: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}

    @property
    def separator(self) -> bytes:
        """Bytes between two tokens; empty but for word-level tokenizers."""
        return self._decoder.separator

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, with the model's own prefix and suffix if asked for.

        Raises `InvalidRequestError` for text that has no UTF-8 form (lone surrogates).
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequestError(f"the text is not valid Unicode: {error}") from error
        forced = self._forced_bos
        if add_special_tokens and forced is not None and ids[:1] != [forced]:
            ids.insert(0, forced)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, special or not; empty for an id without a token."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._look_up(token_id)
        return piece

    def whole_text(self, token_id: int) -> str | None:
        """What a token adds to a text that ends with a whole character; nothing if it is special.

        None if its bytes are not whole characters: then what it adds depends on its neighbours.
        """
        try:
            return self._texts[token_id]
        except KeyError:
            text = self._texts[token_id] = self._look_up_text(token_id)
            return text

    def token_text(self, token_id: int) -> str:
        """One token as a string of its own; `bytes:\\x..` where it is not whole characters."""
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def decode(
        self,
        token_ids: Iterable[int],
        *,
        skip_special_tokens: bool = True,
        continuation: bool = False,
    ) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD.

        With `continuation` the ids follow other text, so that a leading space is kept.
        """
        special = self.special_ids if skip_special_tokens else frozenset()
        pieces = [self.token_bytes(token_id) for token_id in token_ids if token_id not in special]
        return self._decoder.join(pieces, continuation=continuation).decode(errors="replace")

    def _look_up_text(self, token_id: int) -> str | None:
        if token_id in self.special_ids:
            return ""
        try:
            return (self.separator + self.token_bytes(token_id)).decode()
        except UnicodeDecodeError:
            return None

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return self._decoder.piece(token) if token is not None else b""


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a model directory.

    Raises `ModelLoadError` naming the file that is missing, damaged or not supported.
    """
    spec = read_json(directory, "tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises a bare Exception for a damaged file
        raise ModelLoadError(
            f"{directory / 'tokenizer.json'}: not a usable tokenizer: {error}"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    config = read_json(directory, "tokenizer_config.json", required=False)
    names = {**read_json(directory, "special_tokens_map.json", required=False), **config}
    named = {
        name: text for name in _NAMED_TOKENS if (text := _token_text(names.get(name))) is not None
    }
    return Tokenizer(
        backend,
        piece_decoder(spec.get("decoder")),
        named,
        add_bos_token=config.get("add_bos_token") is True,
    )


def _token_text(entry: Any) -> str | None:
    """A special token is written as a string, or as an object with its `content`."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None
