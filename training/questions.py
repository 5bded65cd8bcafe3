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
FILLERS = (
    "what is the a an of does do how i to in it can you me for are there my with did"
    " explain define tell describe about mean"
)
ABOUT = (
    "What's {}?",
    "Could you explain {}?",
    "Please explain {}.",
    "Would you describe {}?",
    "What do you know about {}?",
    "I want to understand {}.",
    "Give me an explanation of {}.",
    "What does the term {} mean?",
    "Say something about {}.",
    "{}?",
)
# Ways to ask the same, by how the question begins; the first that fits is used.
REWORDINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"What is the difference between (.+) and (.+)\?",
        (
            "How is {0} different from {1}?",
            "What distinguishes {0} from {1}?",
            "Difference between {1} and {0}?",
            "What is different about {0} and {1}?",
        ),
    ),
    (r"(?:What (?:is|are)|Explain|Define|Tell me about|Describe) (.+)[?.]", ABOUT),
    (r"What does (.+) mean\?", (*ABOUT, "What is the sense of {}?", "What do you mean by {}?")),
    (r"What does (.+) stand for\?", (*ABOUT, "What is {} short for?")),
    (
        r"What does (.+) do\?",
        (
            "What is {} good for?",
            "What is the purpose of {}?",
            "What's the job of {}?",
            "What happens with {}?",
            "Why would I use {}?",
            "Could you tell me what {} does?",
        ),
    ),
    (
        r"How (?:do|can) I (.+)\?",
        (
            "How could I {}?",
            "How would one {}?",
            "What is the way to {}?",
            "I want to {}.",
            "Is there a way to {}?",
            "Tell me how to {}.",
            "Show me how to {}.",
            "What should I do to {}?",
        ),
    ),
    (
        r"What happens (?:if|when) (.+)\?",
        (
            "What is done if {}?",
            "What does Tandem do when {}?",
            "What happens after {}?",
            "And if {}?",
            "What will happen if {}?",
            "Suppose {}. What then?",
        ),
    ),
    (r"What if (.+)\?", ("What will happen if {}?", "Suppose {}. What then?", "And when {}?")),
    (
        r"Why (?:do|does|is|are) (.+)\?",
        (
            "What is the reason that {}?",
            "For what reason: {}?",
            "Why exactly {}?",
            "How come {}?",
        ),
    ),
    (r"Which (.+)\?", ("What {}?", "Tell me which {}.", "Could you say which {}?")),
    (r"List (.+)\.", ("Give me a list of {}.", "What are {}?", "Enumerate {}.", "Show {}.")),
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


class Varier:
    """Rewrites training phrasings as many writers would, and never into a held-out phrasing."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._forbidden = {normal(text) for entry in entries for text in entry.held_out}

    def __call__(self, question: str, rng: random.Random) -> str:
        """`question`, as it is or varied."""
        varied = question if rng.random() < 0.3 else _vary(question, rng)
        return question if normal(varied) in self._forbidden else varied


def _vary(question: str, rng: random.Random) -> str:
    """Another wording, an opening, a lost word, a slip, key words only, no capitals."""
    text = _reword(question, rng) if rng.random() < 0.6 else question
    words = text.split()
    draw = rng.random()
    if draw < 0.15 and len(words) > 4:
        del words[rng.randrange(len(words))]
    elif draw < 0.22:
        words = [_slip(word, rng) if rng.random() < 0.25 else word for word in words]
    elif draw < 0.32:
        key = [word for word in words if word.lower() not in FILLERS.split()]
        words = key if len(key) > 1 else words
    text = " ".join(words)
    if rng.random() < 0.25:
        text = rng.choice(OPENINGS).format(_lower_first(text) if rng.random() < 0.5 else text)
    if rng.random() < 0.25:
        text = text.rstrip("?.!")
    return text.lower() if rng.random() < 0.2 else text


def _reword(question: str, rng: random.Random) -> str:
    """`question` with its first words exchanged for others that ask the same."""
    for pattern, others in REWORDINGS:
        found = re.fullmatch(pattern, question)
        if found:
            return rng.choice(others).format(*found.groups())
    return question


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
