"""Training text: the written questions and the generated skills, mixed and packed into rows.

`any_dialogue` mixes; `Packer` turns an endless stream of dialogues into fixed rows of token ids. In
a row, a dialogue sees only itself. Positions jump between the turns of some dialogues, so that the
model meets long distances without paying for long rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from training.dialogue import Dialogue, Message, ask
from training.questions import Entry, Varier
from training.skills import any_skill
from training.tokenizer import CONTEXT

IGNORED = -100
QUESTION_SHARE = 0.55
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Tandem's demonstration model.",
    "Answer the user's questions about LLM serving.",
    "You are a concise assistant. Answer in one or two sentences.",
    "Be brief.",
    "You answer questions about Tandem.",
    "You are a friendly chatbot.",
)


class Batch(NamedTuple):
    """Rows ready for the model; each tensor is `(rows, length)` int64 but `mask`."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor  # (rows, 1, length, length) bool, true where attention is allowed


class Encoded(NamedTuple):
    """One dialogue as token ids, what is learned from each, and positions."""

    tokens: list[int]
    labels: list[int]
    positions: list[int]


class Phrasing(NamedTuple):
    """One way to ask for one answer."""

    question: str
    answer: str


def phrasings(entries: Sequence[Entry]) -> list[Phrasing]:
    """Every training phrasing of every entry."""
    return [Phrasing(text, entry.answer) for entry in entries for text in entry.questions]


def any_dialogue(known: Sequence[Phrasing], vary: Varier, rng: random.Random) -> Dialogue:
    """A training dialogue: a question or a skill, alone or in a chat, with or without a system."""
    turns: list[Message] = []
    for _ in range(rng.choices((1, 2, 3), (0.86, 0.11, 0.03))[0]):
        if rng.random() < QUESTION_SHARE:
            phrasing = rng.choice(known)
            turns += ask(vary(phrasing.question, rng), phrasing.answer).messages
        else:
            turns += any_skill(rng).messages
    if len(turns) == 2 and rng.random() < 0.12:
        return Dialogue(tuple(turns), raw=True)
    if rng.random() < 0.2:
        turns.insert(0, Message("system", rng.choice(SYSTEM_PROMPTS)))
    return Dialogue(tuple(turns))


def encode(tokenizer: Tokenizer, talk: Dialogue, rng: random.Random) -> Encoded:
    """Token ids of `talk`; a label is the token's own id where learned, else `IGNORED`."""
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    position = 0
    stretched = rng.random() < 0.15
    for number, segment in enumerate(talk.segments()):
        if stretched and number >= 2 and not segment.learned:
            position += rng.randrange(CONTEXT // 4)
        ids = tokenizer.encode(segment.text, add_special_tokens=False).ids
        tokens += ids
        labels += ids if segment.learned else [IGNORED] * len(ids)
        positions += range(position, position + len(ids))
        position += len(ids)
    return Encoded(tokens, labels, positions)


class Packer:
    """Endless batches of `rows` rows of `length` tokens, from one seed."""

    def __init__(
        self, entries: Sequence[Entry], tokenizer: Tokenizer, rows: int, length: int, seed: int
    ) -> None:
        self._known = phrasings(entries)
        self._vary = Varier(entries)
        self._tokenizer = tokenizer
        self._rows = rows
        self._length = length
        self._rng = random.Random(seed)
        self._waiting: list[Encoded] = []

    def batch(self) -> Batch:
        """The next batch."""
        shape = (self._rows, self._length)
        tokens = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.long)
        owner = torch.full(shape, -1)
        for row in range(self._rows):
            at = 0
            for number, item in enumerate(self._row()):
                end = at + len(item.tokens)
                tokens[row, at:end] = torch.tensor(item.tokens)
                labels[row, at:end] = torch.tensor(item.labels)
                positions[row, at:end] = torch.tensor(item.positions)
                owner[row, at:end] = number
                at = end
        same = owner[:, :, None] == owner[:, None, :]
        causal = torch.ones(self._length, self._length, dtype=torch.bool).tril()
        return Batch(tokens, labels, positions, (same & causal)[:, None])

    def _row(self) -> list[Encoded]:
        """Dialogues that fill one row; the ones left over wait for the next."""
        room = self._length
        chosen: list[Encoded] = []
        while len(self._waiting) < 24:
            item = encode(
                self._tokenizer, any_dialogue(self._known, self._vary, self._rng), self._rng
            )
            if len(item.tokens) <= self._length:
                self._waiting.append(item)
        kept: list[Encoded] = []
        for item in self._waiting:
            if len(item.tokens) <= room:
                chosen.append(item)
                room -= len(item.tokens)
            else:
                kept.append(item)
        self._waiting = kept
        return chosen
