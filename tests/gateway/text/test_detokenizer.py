"""The incremental detokenizer says what the full decode says, and nothing too early."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from tandem.core.errors import ModelLoadError
from tandem.gateway.text.detokenizer import IncrementalDetokenizer
from tandem.gateway.text.pieces import piece_decoder
from tandem.gateway.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


@pytest.fixture(scope="session")
def backend(model_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def stream(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [detokenizer.push(token_id) for token_id in ids], detokenizer.flush()


@given(ids=st.lists(st.integers(0, 330), max_size=40))
def test_any_tokens_join_to_the_full_decode(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, ids: list[int]
) -> None:
    pieces, tail = stream(tokenizer, ids)
    assert "".join(pieces) + tail == tokenizer.decode(ids, continuation=True)
    assert tokenizer.decode(ids) == backend.decode(ids)


@given(text=st.text(max_size=60))
def test_valid_text_never_shows_a_replacement_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    pieces, tail = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert tail == ""
    assert not any("\ufffd" in piece for piece in pieces)


def byte_token(tokenizer: Tokenizer, byte: int) -> int:
    """The id of the single-byte token."""
    return next(i for i in range(4, 320) if tokenizer.token_bytes(i) == bytes([byte]))


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = [byte_token(tokenizer, byte) for byte in "🙂".encode()]
    pieces, tail = stream(tokenizer, ids)
    assert pieces == ["", "", "", "🙂"]
    assert tail == ""


def test_broken_bytes_are_shown_once_they_are_certain(tokenizer: Tokenizer) -> None:
    lead, letter = byte_token(tokenizer, 0xF0), byte_token(tokenizer, ord("a"))
    assert stream(tokenizer, [lead, letter]) == (["", "\ufffda"], "")
    assert stream(tokenizer, [letter, lead]) == (["a", ""], "\ufffd")


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.encode("<|end|>", add_special_tokens=False)
    assert len(end) == 1
    assert stream(tokenizer, end) == ([""], "")
    assert tokenizer.decode(end, skip_special_tokens=False) == "<|end|>"


def test_special_token_inside_a_character_does_not_break_it(tokenizer: Tokenizer) -> None:
    first, second = (byte_token(tokenizer, byte) for byte in "é".encode())
    end = tokenizer.encode("<|end|>", add_special_tokens=False)[0]
    assert stream(tokenizer, [first, end, second]) == (["", "", "é"], "")


def sentencepiece() -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Llama 2's kind: a metaspace for the space, byte tokens for what the vocabulary lacks."""
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "s": 3}
    vocabulary.update({f"<0x{byte:02X}>": 4 + byte for byte in range(256)})
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    spec = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return Tokenizer(backend, piece_decoder(spec), {}), backend


def test_sentencepiece_cuts_the_leading_space_only_at_the_start() -> None:
    tokenizer, backend = sentencepiece()
    ids = [1, 2, 3, *(4 + byte for byte in "🙂é".encode())]
    assert tokenizer.decode(ids) == backend.decode(ids) == "Hello worlds🙂é"
    assert tokenizer.decode([2], continuation=True) == " world"
    pieces, tail = stream(tokenizer, [2, *ids])
    assert "".join(pieces) + tail == " world Hello worlds🙂é"


def test_an_unknown_decoder_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match="WordPiece"):
        piece_decoder({"type": "WordPiece", "prefix": "##", "cleanup": True})
