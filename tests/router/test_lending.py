"""Where a prompt is computed: by hand, and what holds for any load."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.router.lending import (
    Prompt,
    PromptWork,
    WorkerLoad,
    best_move,
    may_keep,
    prefill_seconds,
)
from tandem.scheduler.costs import IterationCosts, Work

COSTS = IterationCosts(fixed=0.030, prompt_token=0.002, decode=0.003, context=0.0, attended=0.0)
IDLE = WorkerLoad(COSTS, budget=256, free_blocks=100)
DECODING = replace(IDLE, running=Work(decodes=10), longest_iteration=0.100)
"""A step takes 60 ms: 20 prompt tokens fit beside it, 200 a second."""
SATURATED = replace(IDLE, running=Work(decodes=20), longest_iteration=0.090)


def prompt(name: str, tokens: int, *, here: bool = False, **fields: object) -> Prompt[str]:
    return Prompt(name, 0, tokens, "p", here)._replace(**fields)  # type: ignore[arg-type]


def test_prompts_beside_decode_steps_take_what_their_objective_leaves() -> None:
    assert prefill_seconds(IDLE, PromptWork(256)) == pytest.approx(0.030 + 0.512)
    assert prefill_seconds(DECODING, PromptWork(200)) == pytest.approx(10 * 0.060 + 0.400)


@pytest.mark.parametrize(
    ("case", "here", "there", "prompts", "moved"),
    [
        ("both idle: it stays", IDLE, IDLE, [prompt("a", 200)], None),
        ("nothing waits: it stays", DECODING, IDLE, [prompt("a", 200)], None),
        (
            "the last of a queue comes here",
            DECODING,
            IDLE,
            [prompt("a", 800), prompt("b", 800), prompt("c", 100)],
            "c",
        ),
        (
            "others' prompts count as a queue",
            DECODING,
            replace(IDLE, queued=PromptWork(2000)),
            [prompt("a", 100)],
            "a",
        ),
        (
            "time gone by counts for the worker that is busy",
            DECODING,
            replace(IDLE, queued=PromptWork(500), credit=0.5),
            [prompt("a", 150)],
            None,
        ),
        (
            "no slack: it waits",
            SATURATED,
            replace(IDLE, queued=PromptWork(1000)),
            [prompt("a", 400)],
            None,
        ),
        (
            "no blocks: it waits",
            DECODING,
            replace(IDLE, queued=PromptWork(2000)),
            [prompt("a", 100, blocks=101)],
            None,
        ),
        (
            "the tail of a prompt under way comes too",
            IDLE,
            replace(IDLE, queued=PromptWork(2000)),
            [prompt("a", 600, start=400)],
            "a",
        ),
        (
            "it has moved often enough",
            DECODING,
            replace(IDLE, queued=PromptWork(2000)),
            [prompt("a", 100, may_move=False)],
            None,
        ),
        ("an idle worker takes it back", DECODING, IDLE, [prompt("a", 400, here=True)], "a"),
        (
            "without a prefill worker there is no other place",
            DECODING,
            IDLE,
            [prompt("a", 400, here=True, target="")],
            None,
        ),
    ],
)  # fmt: skip
def test_where_a_prompt_is_computed(
    case: str,
    here: WorkerLoad,
    there: WorkerLoad,
    prompts: list[Prompt[str]],
    moved: str | None,
) -> None:
    move = best_move(here, {"p": there}, prompts, margin=0.15)
    assert (move.key if move else None) == moved, case


def test_a_worker_that_has_not_said_what_it_costs_is_left_alone() -> None:
    queue = [prompt(name, 1000) for name in "abc"]
    assert best_move(DECODING, {}, queue, margin=0.0) is None


@pytest.mark.parametrize(
    ("case", "load", "blocks", "kept"),
    [
        ("idle, with room", IDLE, 100, True),
        ("a prompt waits there", replace(IDLE, queued=PromptWork(1)), 10, False),
        ("not enough blocks", IDLE, 101, False),
        ("a step with one more is too long", replace(DECODING, longest_iteration=0.062), 1, False),
        ("a step with one more is not", replace(DECODING, longest_iteration=0.064), 1, True),
    ],
)
def test_what_a_prefill_worker_keeps(case: str, load: WorkerLoad, blocks: int, kept: bool) -> None:
    assert may_keep(load, 100, blocks) == kept, case


LOADS = st.builds(
    WorkerLoad,
    costs=st.builds(
        IterationCosts,
        fixed=st.floats(0.001, 0.1),
        prompt_token=st.floats(1e-5, 0.01),
        decode=st.floats(0, 0.01),
        context=st.floats(0, 1e-6),
        attended=st.floats(0, 1e-7),
    ),
    budget=st.integers(16, 512),
    running=st.builds(Work, decodes=st.integers(0, 30), context=st.integers(0, 10_000)),
    longest_iteration=st.floats(0.01, 0.5),
    queued=st.builds(PromptWork, st.integers(0, 3000), st.integers(0, 10_000)),
    credit=st.floats(0, 1),
    free_blocks=st.integers(0, 100),
)
PROMPTS = st.lists(
    st.builds(
        Prompt,
        key=st.uuids(),
        start=st.integers(0, 100),
        end=st.integers(101, 3000),
        target=st.sampled_from(["p", "q", "unknown", ""]),
        is_here=st.booleans(),
        may_move=st.booleans(),
        blocks=st.integers(0, 120),
    ),
    max_size=12,
)


@given(here=LOADS, there=st.dictionaries(st.sampled_from(["p", "q"]), LOADS), prompts=PROMPTS)
def test_a_move_is_allowed_and_is_not_undone(
    here: WorkerLoad, there: dict[str, WorkerLoad], prompts: list[Prompt[object]]
) -> None:
    move = best_move(here, there, prompts, margin=0.15)
    if move is None:
        return
    (moved,) = [each for each in prompts if each.key == move.key]
    assert moved.may_move
    assert moved.target in there
    assert moved.is_here or moved.blocks <= here.free_blocks
    assert move.gain > 0
    # Where it went it is last in line, and by the same figures it would not go back at once.
    rest = [each for each in prompts if each.key != move.key]
    after = best_move(here, there, [*rest, moved._replace(is_here=not moved.is_here)], 0.15)
    assert after is None or after.key != move.key


@given(here=LOADS, there=LOADS, prompts=PROMPTS)
def test_moving_ends(here: WorkerLoad, there: WorkerLoad, prompts: list[Prompt[object]]) -> None:
    """Every prompt may move three times: so many moves and no more, whatever the loads."""
    left = {each.key: 3 for each in prompts}
    for count in range(3 * len(prompts) + 1):
        move = best_move(here, {"p": there}, prompts, margin=0.0)
        if move is None:
            return
        left[move.key] -= 1
        prompts = [
            each._replace(is_here=not each.is_here, may_move=left[each.key] > 0)
            if each.key == move.key
            else each
            for each in prompts
        ]
        assert count < 3 * len(prompts)
