"""Lending by dice: prompts move at random moments, whatever is predicted, so that every window of a
move is hit in a few seconds. Given to `local_cluster` as `prepare`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from random import Random
from typing import Any

from tandem.router import lending
from tandem.router.lending import Move, Prompt, WorkerLoad


def move_at_random(worker: str) -> None:
    """Let the decode worker in this process move any prompt that may move, one time in four."""
    rng = Random(worker)

    def random_move(
        here: WorkerLoad,
        elsewhere: Mapping[str, WorkerLoad],
        prompts: Iterable[Prompt[Any]],
        *_thresholds: float,
    ) -> Move[Any] | None:
        movable = [
            prompt
            for prompt in prompts
            if prompt.may_move
            and prompt.target in elsewhere
            and (prompt.is_here or prompt.blocks <= here.free_blocks)
        ]
        if not movable or rng.random() < 0.75:
            return None
        return Move(rng.choice(movable).key, 1.0)

    lending.best_move = random_move
