"""How a program that holds an engine talks to the benchmark: JSON lines on stdin and stdout.

A line in asks for one batch: `{"prompts": [[id, ...], ...], "max_tokens": n}`. A line out has the
seconds from the ask to every token of every request: `{"token_times": [[s, ...], ...]}`. The first
line out is `{"ready": "what runs"}`. Programs run on a peer's own Python, so this file needs
nothing; whatever libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], list[list[float]]]
"""Takes prompts and the number of tokens wanted; returns `time.perf_counter()` of every token."""


def serve(load: Callable[[list[str]], tuple[str, Generate]]) -> None:
    """Load an engine from the program's arguments and answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, object]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    description, generate = load(sys.argv[1:])
    answer({"ready": description})
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        times = generate(job["prompts"], job["max_tokens"])
        answer({"token_times": [[moment - start for moment in request] for request in times]})
