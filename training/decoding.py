"""Greedy decoding of many prompts at once with `transformers`, as the reference does it.

Used by the evaluation and by the tests. It is not Tandem's engine, and shares no code with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 64


class Decoder:
    """A saved model, loaded in float32 from its rounded weights."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        # Typed loosely: the library's own annotations refuse `generate` on what this returns.
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        self.model.eval()  # type: ignore[no-untyped-call]

    def answers(self, prompts: Sequence[str], longest: int = 320) -> list[str]:
        """What the model says after each prompt, in order; an answer that never ends is `""`."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found = [""] * len(prompts)
        for at in range(0, len(order), BATCH):
            chosen = order[at : at + BATCH]
            texts = self._batch([prompts[index] for index in chosen], longest)
            for index, text in zip(chosen, texts, strict=True):
                found[index] = text
        return found

    @torch.inference_mode()
    def _batch(self, prompts: list[str], longest: int) -> list[str]:
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = self.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        end = self.tokenizer.eos_token_id
        texts: list[str] = []
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            ended = end in row
            texts.append(str(self.tokenizer.decode(row[: row.index(end)])) if ended else "")
        return texts
