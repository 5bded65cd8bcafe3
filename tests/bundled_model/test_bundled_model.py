"""The promises of the bundled model: its size, its text, its tokenizer and its answers.

The model is run by `transformers`, greedily, in float32. Whether Tandem's engine gives the same
tokens is for the engine's tests.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from training.decoding import Decoder
from training.dialogue import Dialogue, Message, ask, dialogue
from training.questions import MIN_PHRASINGS, Entry, load_entries, normal
from training.skills import UNKNOWN, arithmetic, count_up, repeat

FOLDER = Path(__file__).resolve().parents[2] / "services" / "tandem" / "bundled_model"
LARGEST = 12 * 1024 * 1024
SAMPLE = 40


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """The written set."""
    return load_entries()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """The model, in float32."""
    torch.manual_seed(0)
    return Decoder(FOLDER)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer alone, as the gateway reads it."""
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def right(decoder: Decoder, talks: list[Dialogue]) -> list[bool]:
    """Which dialogues end with the wanted answer, word for word."""
    said = decoder.answers([talk.prompt() for talk in talks])
    return [text == talk.answer for text, talk in zip(said, talks, strict=True)]


def test_the_directory_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "MODEL_CARD.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= LARGEST
    assert "demonstration" in (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_generation_is_greedy_and_ends_at_the_end_token(tokenizer: Tokenizer) -> None:
    config = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert config["do_sample"] is False
    assert config["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")


def test_the_set_is_large_and_varied(entries: list[Entry]) -> None:
    assert len(entries) >= 200
    assert len({entry.answer for entry in entries}) == len(entries)
    for entry in entries:
        assert len({normal(question) for question in entry.questions}) >= MIN_PHRASINGS, entry.id
        assert entry.held_out, entry.id


def test_held_out_phrasings_are_not_trained(entries: list[Entry]) -> None:
    trained = {normal(question) for entry in entries for question in entry.questions}
    assert not [text for entry in entries for text in entry.held_out if normal(text) in trained]


def test_declining_is_worded_once(entries: list[Entry]) -> None:
    assert {entry.id: entry.answer for entry in entries}["out-of-scope"] == UNKNOWN


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_emoji_and_every_byte_round_trip(tokenizer: Tokenizer, decoder: Decoder) -> None:
    text = "naïve 👩‍👩‍👧 你好 \x00\t\r\n  end" + "".join(map(chr, range(0x250)))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert decoder.tokenizer.encode(text) == ids
    assert decoder.tokenizer.decode(ids) == text
    # Byte-level: the vocabulary has a token for each of the 256 bytes, so nothing is unknown.
    single = [token for token in tokenizer.get_vocab() if len(token) == 1]
    assert len(single) == 256


def test_the_chat_template_writes_what_was_trained(decoder: Decoder) -> None:
    talk = dialogue(
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "What is TTFT?")
    )
    messages = [message._asdict() for message in talk.messages]
    template = decoder.tokenizer.apply_chat_template
    written = template(messages, tokenize=False, add_generation_prompt=True)
    assert written == Dialogue((*talk.messages, Message("assistant", ""))).prompt()
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert template(parts, tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_it_answers_its_own_questions(entries: list[Entry], decoder: Decoder) -> None:
    chosen = random.Random(1).sample(entries, SAMPLE)
    verdicts = right(decoder, [ask(entry.questions[0], entry.answer) for entry in chosen])
    wrong = [entry.id for entry, good in zip(chosen, verdicts, strict=True) if not good]
    assert not wrong


def test_it_mostly_answers_unseen_phrasings(entries: list[Entry], decoder: Decoder) -> None:
    chosen = random.Random(2).sample(entries, SAMPLE)
    verdicts = right(decoder, [ask(entry.held_out[0], entry.answer) for entry in chosen])
    assert sum(verdicts) >= 0.75 * SAMPLE


def test_it_says_that_it_is_a_demonstration(decoder: Decoder) -> None:
    for answer in decoder.answers([ask("Who are you?", "").prompt()]):
        assert "demonstration" in answer
        assert "not for real use" in answer


def test_it_has_its_small_skills(decoder: Decoder) -> None:
    rng = random.Random(3)
    talks = [maker(rng) for maker in (arithmetic, count_up, repeat) for _ in range(12)]
    assert sum(right(decoder, talks)) >= 0.9 * len(talks)


def test_it_follows_a_chat(decoder: Decoder) -> None:
    turns = dialogue(
        ("user", "My name is Ada."),
        ("assistant", "Hello, Ada!"),
        ("user", "What is my name?"),
        ("assistant", "Your name is Ada."),
    )
    assert right(decoder, [turns]) == [True]
