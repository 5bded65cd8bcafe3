"""Judges a saved model: `python -m training.evaluate FOLDER`.

Decodes greedily, in float32 from the saved bfloat16 weights, every training phrasing, every
held-out phrasing and fresh draws of every skill; prints how many answers are right and those that
are not. Exact means equal; near means that at least nine tenths of the text agrees. It exits with 1
if a target is missed.
"""

from __future__ import annotations

import argparse
import difflib
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from training.corpus import SYSTEM_PROMPTS
from training.decoding import Decoder
from training.dialogue import Dialogue, Message, ask
from training.questions import Entry, load_entries
from training.skills import SKILLS

SEED = 7
NEAR = 0.9
TARGETS = {"canonical": 1.0, "training": 0.99, "held out": 0.8, "skills": 0.95}


class Score(NamedTuple):
    """Right answers out of all, exactly and nearly."""

    exact: int
    near: int
    total: int

    @property
    def rate(self) -> float:
        """The share that is exactly right."""
        return self.exact / max(1, self.total)


def judge(decoder: Decoder, talks: Sequence[Dialogue], show: bool) -> Score:
    """Score the last answer of every dialogue; `show` prints the wrong ones."""
    exact = near = 0
    found = decoder.answers([talk.prompt() for talk in talks])
    for talk, said in zip(talks, found, strict=True):
        said, wanted = said.strip(), talk.answer
        close = difflib.SequenceMatcher(None, said, wanted, autojunk=False).ratio() >= NEAR
        exact += said == wanted
        near += close
        if show and said != wanted:
            print(f"  asked {talk.messages[-2].content!r}\n   said {said!r}\n wanted {wanted!r}")
    return Score(exact, near, len(talks))


def questions(entries: Sequence[Entry]) -> dict[str, list[Dialogue]]:
    """The written questions, by what is asked of them."""
    with_system = Message("system", SYSTEM_PROMPTS[0])
    canonical = [ask(entry.questions[0], entry.answer) for entry in entries]
    return {
        "canonical": canonical,
        "training": [ask(text, entry.answer) for entry in entries for text in entry.questions],
        "held out": [ask(text, entry.answer) for entry in entries for text in entry.held_out],
        "with a system prompt": [Dialogue((with_system, *talk.messages)) for talk in canonical],
        "second turn": [
            Dialogue((*first.messages, *second.messages))
            for first, second in zip(canonical, canonical[7:] + canonical[:7], strict=True)
        ],
        "as plain text": [Dialogue(talk.messages, raw=True) for talk in canonical],
    }


def skill_draws(each: int) -> dict[str, list[Dialogue]]:
    """Fresh draws of every skill, from a seed that training does not use."""
    rng = random.Random(SEED)
    return {name: [maker(rng) for _ in range(each)] for name, (maker, _) in SKILLS.items()}


def _print(name: str, score: Score) -> None:
    near = score.near / max(1, score.total)
    print(f"{name:22} exact {score.rate:7.2%}  near {near:7.2%}  of {score.total}", flush=True)


def evaluate(folder: Path, each: int, show: bool) -> bool:
    """Print every score; true if every target is met."""
    decoder = Decoder(folder)
    rates: dict[str, float] = {}
    for name, talks in questions(load_entries()).items():
        score = judge(decoder, talks, show)
        rates[name] = score.rate
        _print(name, score)
    scores = []
    for name, talks in skill_draws(each).items():
        scores.append(judge(decoder, talks, show))
        _print(f"skill {name}", scores[-1])
    total = Score(*(sum(values) for values in zip(*scores, strict=True)))
    rates["skills"] = total.rate
    _print("skills", total)
    missed = [name for name, target in TARGETS.items() if rates[name] < target]
    print(f"targets missed: {', '.join(missed)}" if missed else "every target is met")
    return not missed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=60, help="draws of each skill")
    parser.add_argument("--show", action="store_true", help="print the wrong answers")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not evaluate(arguments.folder, arguments.each, arguments.show):
        sys.exit(1)


if __name__ == "__main__":
    main()
