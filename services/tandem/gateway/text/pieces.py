"""The bytes that each token stands for, by the decoder that `tokenizer.json` names.

Decoding is done on bytes, not on strings: a token may be half a character, and only bytes can be
joined one token at a time. Byte-level BPE (Llama 3, Qwen) and SentencePiece BPE with byte fallback
(Llama 2, Mistral) are covered; another decoder is refused by name. Knows nothing of special tokens
and does not turn bytes into text.

Invariant: the bytes of a sequence are the concatenation of the bytes of its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem.core.errors import ModelLoadError

SUPPORTED = "ByteLevel, Metaspace, or a Sequence of Replace, ByteFallback, Fuse and Strip"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (GPT-2's reversible table).

    Printable Latin-1 bytes stand for themselves; the others take code points from 256 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF = _byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """How the written form of a token becomes bytes."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    separator: bytes = b""
    """Written before every token but the first."""
    leading_spaces: int = 0
    """Spaces that are cut from the start of a text."""

    def piece(self, token: str) -> bytes:
        """The bytes of one token of the vocabulary."""
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in token])
            except KeyError:
                return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        return token.encode()

    def join(self, pieces: Iterable[bytes], *, continuation: bool) -> bytes:
        """The bytes of a text. A continuation follows other text and keeps its first space."""
        if continuation:
            return b"".join(self.separator + piece for piece in pieces)
        joined = self.separator.join(pieces)
        for _ in range(self.leading_spaces):
            joined = joined.removeprefix(b" ")
        return joined


def piece_decoder(spec: Mapping[str, Any] | None) -> PieceDecoder:
    """Return the decoder for the `decoder` entry of a `tokenizer.json`.

    Raises `ModelLoadError` naming the decoder if it is not one of `SUPPORTED`.
    """
    if spec is None:
        return PieceDecoder(separator=b" ")
    settings: dict[str, Any] = {}
    for step in spec["decoders"] if spec.get("type") == "Sequence" else [spec]:
        reader = _STEPS.get(str(step.get("type")))
        if reader is None:
            raise ModelLoadError(
                f"tokenizer.json: decoder {step.get('type')!r} is not supported; "
                f"supported: {SUPPORTED}"
            )
        reader(step, settings)
    return PieceDecoder(**settings)


def _byte_level(step: Mapping[str, Any], settings: dict[str, Any]) -> None:
    settings["byte_level"] = True


def _byte_fallback(step: Mapping[str, Any], settings: dict[str, Any]) -> None:
    settings["byte_fallback"] = True


def _fuse(step: Mapping[str, Any], settings: dict[str, Any]) -> None:
    """Joining is what we do anyway."""


def _replace(step: Mapping[str, Any], settings: dict[str, Any]) -> None:
    pattern = step["pattern"].get("String")
    if pattern is None:
        raise ModelLoadError(
            "tokenizer.json: a Replace decoder with a regular expression is not supported"
        )
    settings["replacements"] = (*settings.get("replacements", ()), (pattern, step["content"]))


def _strip(step: Mapping[str, Any], settings: dict[str, Any]) -> None:
    if step["content"] != " " or step["stop"] != 0:
        raise ModelLoadError(
            "tokenizer.json: a Strip decoder that cuts more than leading spaces is not supported"
        )
    settings["leading_spaces"] = step["start"]


def _metaspace(step: Mapping[str, Any], settings: dict[str, Any]) -> None:
    settings["replacements"] = (*settings.get("replacements", ()), (step["replacement"], " "))
    prepends = step.get("prepend_scheme", "always") != "never" and step.get(
        "add_prefix_space", True
    )
    settings["leading_spaces"] = 1 if prepends else 0


_STEPS: Mapping[str, Callable[[Mapping[str, Any], dict[str, Any]], None]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Fuse": _fuse,
    "Replace": _replace,
    "Strip": _strip,
    "Metaspace": _metaspace,
}
