"""A dialogue and its one textual form, shared by training, evaluation and the chat template.

Holds the special tokens, the chat template and `render`, which writes the same text as the
template but keeps apart what the model must learn to say from what it is only shown.
It does not know any subject (see `questions.py` and `skills.py`) and touches no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Role = Literal["system", "user", "assistant"]

PAD = "<|pad|>"
START = "<|im_start|>"
END = "<|im_end|>"
SPECIAL_TOKENS = (PAD, START, END)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] or [] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


class Message(NamedTuple):
    """One turn."""

    role: Role
    content: str


class Segment(NamedTuple):
    """A run of text and whether the model is trained to produce it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Dialogue:
    """Turns in order; `raw` writes one question and answer as plain `Q:` / `A:` text instead."""

    messages: tuple[Message, ...]
    raw: bool = False

    @property
    def answer(self) -> str:
        """The last assistant turn."""
        return self.messages[-1].content

    def prompt(self) -> str:
        """The text after which the model is to produce `answer`."""
        return "".join(segment.text for segment in self.segments()[:-1])

    def segments(self) -> list[Segment]:
        """The dialogue as text; a learned segment ends with the end token it must emit."""
        return _raw_segments(self.messages) if self.raw else _chat_segments(self.messages)


def dialogue(*turns: tuple[Role, str], raw: bool = False) -> Dialogue:
    """A dialogue from `(role, content)` pairs."""
    return Dialogue(tuple(Message(role, content) for role, content in turns), raw)


def ask(question: str, answer: str) -> Dialogue:
    """One question and its answer, with no system prompt."""
    return dialogue(("user", question), ("assistant", answer))


def _chat_segments(messages: tuple[Message, ...]) -> list[Segment]:
    segments: list[Segment] = []
    shown = ""
    for message in messages:
        shown += f"{START}{message.role}\n"
        if message.role == "assistant":
            segments += [Segment(shown, False), Segment(message.content + END, True)]
            shown = "\n"
        else:
            shown += f"{message.content}{END}\n"
    return segments


def _raw_segments(messages: tuple[Message, ...]) -> list[Segment]:
    question, answer = messages[-2], messages[-1]
    return [
        Segment(f"Q: {question.content}\nA:", False),
        Segment(f" {answer.content}{END}", True),
    ]
