"""Where a prompt is computed: by hand, and what holds for any load."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import SchedulerConfig
from tandem.core.request import Request
from tandem.core.sampling import SamplingParams
from tandem.core.sequence import Sequence
from tandem.kvcache.block_pool import BlockPool
from tandem.router.lending import (
    LegPhase,
    Prompt,
    PromptWork,
    WorkerLoad,
    best_move,
    has_slack,
    may_change_places,
    may_keep,
    prefill_seconds,
    prompt_of,
    prompt_token_seconds,
    prompts_here,
)
from tandem.scheduler import Scheduler
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


def test_a_move_that_saves_less_than_its_messages_take_is_not_worth_it() -> None:
    queue = [prompt(name, 1000) for name in "abc"]
    move = best_move(IDLE, {"p": IDLE}, queue, margin=0.0)
    assert move is not None
    assert best_move(IDLE, {"p": IDLE}, queue, 0.0, min_gain=move.gain) is None
    assert best_move(IDLE, {"p": IDLE}, queue, 0.0, min_gain=0.99 * move.gain) == move


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
    assert has_slack(load, 100, blocks) == kept, case


def make_scheduler() -> Scheduler:
    config = SchedulerConfig(max_batch_tokens=16, chunk_size=16)
    return Scheduler(config, BlockPool(num_blocks=64, block_size=4), max_model_len=200)


def test_a_worker_says_what_a_prompt_token_takes_beside_what_it_decodes() -> None:
    """In iterations of 16 tokens; once it has measured enough to know."""
    scheduler = make_scheduler()
    assert prompt_token_seconds(scheduler) == 0.0
    for decodes in range(8):
        for tokens in (8, 16):
            work = Work(tokens, decodes)
            scheduler.costs.measured(work, COSTS.seconds(work))
    assert prompt_token_seconds(scheduler) == pytest.approx(0.030 / 16 + 0.002, rel=0.01)
    kept = make_sequence(0, 8)
    scheduler.add(kept)
    scheduler.advance(scheduler.schedule())
    scheduler.append(kept, 7)
    assert prompt_token_seconds(scheduler) == pytest.approx(0.033 / 16 + 0.002, rel=0.01)


def make_sequence(arrival: int, num_tokens: int) -> Sequence:
    sampling = SamplingParams(max_tokens=20)
    return Sequence(Request(f"r{arrival}", (7,) * num_tokens, num_tokens, sampling), arrival)


def test_only_prompts_that_are_computed_here_are_prompts_here() -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(arrival, 30) for arrival in range(4)]
    sequences[1].remote = True
    sequences[2].host_blocks = [0]
    for sequence in sequences:
        scheduler.add(sequence)
    assert list(prompts_here(scheduler)) == [sequences[0], sequences[3]]
    for _ in range(2):  # two chunks are all of it: from then on it decodes
        scheduler.advance(scheduler.schedule())
    scheduler.append(sequences[0], 7)
    assert list(prompts_here(scheduler)) == [sequences[3]]


def test_a_prompt_leaves_only_between_iterations_and_with_room_for_all_its_tokens() -> None:
    scheduler, sequence = make_scheduler(), make_sequence(0, 30)

    def may_move(moves_left: int = 1) -> bool:
        here = prompt_of(scheduler, "a", sequence, 0, "p", is_here=True, moves_left=moves_left)
        return here.may_move

    scheduler.add(sequence)
    assert may_move()
    assert not may_move(moves_left=0)
    plan = scheduler.schedule()
    scheduler.launch(plan)
    assert not may_move()
    scheduler.advance(plan)
    assert may_move()
    slots = len(sequence.block_table) * scheduler.pool.block_size
    sequence.token_ids.extend([7] * (slots + 1 - sequence.num_tokens))
    assert not may_move()
    with pytest.raises(ValueError, match=r"8 blocks of 4 for 33 tokens"):
        scheduler.hand_out(sequence)


@pytest.mark.parametrize(
    ("case", "phases", "kept"),
    [
        ("nothing else", [], True),
        ("others wait for blocks here", ["offered", "offered"], True),
        ("one is kept and another may be", ["kept", "offered"], True),
        ("as many are kept as may be", ["kept", "kept"], False),
        ("one waits for its turn there", ["offered", "asked"], False),
        ("one is computed there", ["granted"], False),
        ("one is about to come back", ["kept", "cutting"], False),
    ],
)
def test_a_prefill_worker_keeps_while_it_has_nothing_else_of_ours(
    case: str, phases: list[LegPhase], kept: bool
) -> None:
    sequence = make_sequence(0, 30)  # 50 tokens at its longest: 13 blocks
    load = replace(IDLE, free_blocks=26)
    assert may_keep(make_scheduler(), sequence, load, phases, max_kept=2) == kept, case
    too_few = replace(load, free_blocks=13 * (1 + phases.count("kept")) - 1)
    assert not may_keep(make_scheduler(), sequence, too_few, phases, max_kept=2), case


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


def test_decode_steps_alone_give_no_reason_to_move_a_prompt() -> None:
    scheduler = Scheduler(SchedulerConfig(), BlockPool(16, 4), 64)
    request = Request("r", tuple(range(8)), 8, SamplingParams(max_tokens=4))
    assert not may_change_places(Work(decodes=1), scheduler)
    assert may_change_places(Work(prompt_tokens=8), scheduler)
    scheduler.add(Sequence(request, 0, remote=True))
    assert not may_change_places(Work(decodes=1), scheduler), "its prompt is computed elsewhere"
    scheduler.add(Sequence(request, 1))
    assert may_change_places(Work(decodes=1), scheduler)


@given(context=st.integers(0, 50_000), steps=st.integers(1, 64), left=st.integers(1, 3000))
def test_a_prompt_that_stays_elsewhere_stays_there_through_decode_steps(
    context: int, steps: int, left: int
) -> None:
    """Why nobody is asked after mere decode steps."""
    costs = COSTS._replace(context=1e-6)
    queued = replace(IDLE, queued=PromptWork(500))

    def moves(after: int) -> bool:
        running = Work(decodes=8, context=context + 8 * after)
        here = replace(IDLE, costs=costs, running=running, longest_iteration=0.2)
        return best_move(here, {"p": queued}, [prompt("a", left)], 0.15) is not None

    if not moves(0):
        assert not moves(steps)
