"""The written question-and-answer set: reading, checking and varying it.

Reads `training/data/*.yaml`. Held-out phrasings are for evaluation alone: nothing here puts one
into training text, and `load_entries` refuses a set in which one is also a training phrasing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

DATA = Path(__file__).parent / "data"
MIN_PHRASINGS = 5

OPENINGS = (
    "Please tell me: {}",
    "Quick question: {}",
    "Hi! {}",
    "Hello. {}",
    "Hey, {}",
    "I have a question. {}",
    "I am new to this. {}",
    "Can you help me? {}",
    "One more thing: {}",
    "So, {}",
    "OK. {}",
    "{} Please be brief.",
    "{} Thanks!",
    "{} Please explain.",
    "{} I would like to know.",
    "Could you tell me, {}",
    "In short, {}",
    "In one or two sentences: {}",
    "In Tandem, {}",
    "For LLM serving, {}",
)


@dataclass(frozen=True)
class Entry:
    """One fact, the phrasings that train it and those that only test it."""

    id: str
    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]


def normal(text: str) -> str:
    """`text` without case, punctuation or spare space, to compare phrasings by."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def load_entries(folder: Path = DATA) -> list[Entry]:
    """Every entry of every YAML file, in file order; ValueError names a broken one."""
    entries: list[Entry] = []
    for path in sorted(folder.glob("*.yaml")):
        entries += [
            Entry(item["id"], item["answer"], tuple(item["ask"]), tuple(item["held_out"]))
            for item in yaml.safe_load(path.read_text(encoding="utf-8"))
        ]
    _check(entries)
    return entries


def _check(entries: Sequence[Entry]) -> None:
    seen: dict[str, str] = {}
    ids: set[str] = set()
    for entry in entries:
        if entry.id in ids:
            raise ValueError(f"entry {entry.id}: the id occurs twice")
        ids.add(entry.id)
        if len(entry.questions) < MIN_PHRASINGS or not entry.held_out:
            raise ValueError(
                f"entry {entry.id}: needs {MIN_PHRASINGS} phrasings and one held out, "
                f"has {len(entry.questions)} and {len(entry.held_out)}"
            )
        for question in (*entry.questions, *entry.held_out):
            other = seen.setdefault(normal(question), entry.id)
            if other != entry.id:
                raise ValueError(f"entry {entry.id}: {question!r} also asks for {other}")
        trained = {normal(question) for question in entry.questions}
        for question in entry.held_out:
            if normal(question) in trained:
                raise ValueError(f"entry {entry.id}: held out but trained: {question!r}")


def vary(question: str, rng: random.Random) -> str:
    """A careless writer's version of `question`: an opening, a lost word, a slip, no capitals."""
    draw = rng.random()
    if draw < 0.35:
        return question
    words = question.split()
    if draw < 0.55 and len(words) > 4:
        del words[rng.randrange(len(words))]
    elif draw < 0.62:
        words = [_slip(word, rng) if rng.random() < 0.25 else word for word in words]
    text = " ".join(words)
    if rng.random() < 0.3:
        text = rng.choice(OPENINGS).format(_lower_first(text) if rng.random() < 0.5 else text)
    if rng.random() < 0.3:
        text = text.rstrip("?.!")
    return text.lower() if rng.random() < 0.25 else text


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _slip(word: str, rng: random.Random) -> str:
    """`word` with two neighbouring letters exchanged, or one left out."""
    if len(word) < 5:
        return word
    at = rng.randrange(1, len(word) - 2)
    if rng.random() < 0.5:
        return word[:at] + word[at + 1 :]
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
