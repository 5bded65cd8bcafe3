"""Each policy on a small hand-made case: the exact iterations that it exists for."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from iterations import make_bench
from tandem.core.config import SchedulerConfig
from tandem.core.errors import ConfigError
from tandem.scheduler import Policy, Steps, Task, View, make_policy, policy_name
from tandem.scheduler.policies import ENTRY_POINT_GROUP, POLICIES


def test_static_batching_runs_a_group_to_the_end_of_its_longest_member() -> None:
    bench = make_bench("static_batching", batch_size=2, batch_wait=5)
    bench.add("a", 4, output=3)
    assert bench.step() == "", "it waits for a second member"
    bench.add("b", 6, output=1)
    bench.add("c", 2, output=2)
    assert bench.steps(4) == ["a4 b6", "a1", "a1", ""]  # c may not take the place that b left
    assert bench.steps(3) == ["", "c2", "c1"], "5 seconds after it came, c goes without a group"


def test_static_batching_admits_a_group_that_exceeds_one_budget() -> None:
    bench = make_bench("static_batching", batch_size=3)
    for name in "abc":
        bench.add(name, 10, output=2)
    bench.add("d", 1, output=1)
    assert bench.finish() == ["a10 b6", "b4 c10", "a1 b1 c1", "d1"]


def test_continuous_batching_lets_sequences_join_and_leave_between_any_two_iterations() -> None:
    bench = make_bench("continuous_batching")
    bench.add("a", 4, output=3)
    bench.add("b", 6, output=1)
    assert bench.step() == "a4 b6"
    bench.add("c", 14, output=2)
    assert bench.finish() == ["a1 c14", "a1 c1"]


def test_continuous_batching_does_not_cut_a_prompt_below_the_budget() -> None:
    bench = make_bench("continuous_batching", chunk_size=2)
    bench.add("a", 40)
    assert bench.finish() == ["a16", "a16", "a8"]


def test_iteration_level_gives_every_active_sequence_one_task() -> None:
    bench = make_bench("iteration_level", chunk_size=4)
    bench.add("a", 2, output=4)
    bench.add("b", 9, output=2)
    assert bench.finish() == ["a2 b4", "a1 b4", "a1 b1", "a1 b1"]


def test_iteration_level_goes_round_when_the_budget_is_short() -> None:
    bench = make_bench("iteration_level", max_batch_tokens=6, chunk_size=2)
    for name in "abc":
        bench.add(name, 4, output=2)
    bench.step()
    bench.scheduler.config = bench.scheduler.config.model_copy(update={"max_batch_tokens": 2})
    assert bench.steps(3) == ["a2", "b2", "c2"]
    assert bench.steps(2) == ["a1 b1", "c1"]


def test_prefill_first_stalls_running_sequences_while_prompts_come() -> None:
    bench = make_bench("prefill_first")
    bench.add("a", 4, output=3)
    assert bench.step() == "a4"
    bench.add("b", 20, output=2)
    bench.add("c", 6, output=1)
    assert bench.finish() == ["b16", "b4 c6", "a1 b1", "a1"]


def test_decode_first_lets_a_prompt_in_once_per_streak() -> None:
    bench = make_bench("decode_first", decode_streak=3)
    bench.add("a", 4, output=10)
    assert bench.step() == "a4"
    bench.add("b", 10, output=2)
    expected = ["a1", "a1", "a1", "a1 b8", "a1", "a1", "a1", "a1 b2", "a1 b1"]
    assert bench.finish() == expected


def test_decode_first_admits_what_costs_no_compute_at_once() -> None:
    bench = make_bench("decode_first")
    bench.add("a", 4, output=10)
    bench.step()
    remote = bench.add("b", 10, output=2, remote=True)
    assert bench.step() == "a1"
    assert remote.phase == "receiving"


def test_chunked_prefill_never_stalls_a_running_sequence() -> None:
    bench = make_bench("chunked_prefill")
    bench.add("a", 4, output=4)
    assert bench.step() == "a4"
    bench.add("b", 20, output=1)
    assert bench.finish() == ["a1 b8", "a1 b8", "a1 b4"]


def test_auto_chunk_sizes_chunks_by_the_measured_cost_of_iterations() -> None:
    bench = make_bench("auto_chunk", max_batch_tokens=256, chunk_size=64, auto_chunk_ratio=3.02)
    bench.seconds = lambda work: 0.010 + 0.0005 * work.prompt_tokens
    bench.add("a", 4, output=800)
    bench.step()
    for length in (30, 90):  # as long as the machine is unknown, chunks have their set size
        bench.add("p", length)
        assert bench.step() == f"a1 p{min(length, 64)}"
        bench.steps(5)
    # A decode step takes 10 ms, so an iteration may take 30 ms: 40 tokens at 0.5 ms each.
    bench.add("q", 100)
    assert bench.steps(3) == ["a1 q40", "a1 q40", "a1 q20"]
    bench.seconds = lambda work: 0.010 + 0.001 * work.prompt_tokens
    for length in [10, 40, 0, 25, 70] * 50:
        if length:
            bench.add("r", length)
        bench.step()
    bench.finish_prompts()
    bench.add("s", 60)
    assert bench.step() in ("a1 s19", "a1 s20", "a1 s21"), "the machine has become slower"


def test_auto_chunk_remembers_its_decode_steps_while_prompts_never_end() -> None:
    bench = make_bench("auto_chunk", max_batch_tokens=256, chunk_size=64, auto_chunk_ratio=2.0)
    # The first 16 prompt tokens are free, so lines through larger chunks point below the steps.
    bench.seconds = lambda work: 0.034 + 0.0012 * max(0, work.prompt_tokens - 16)
    bench.add("a", 4, output=800)
    bench.steps(20)
    for _ in range(20):
        bench.add("p", 440, output=1)
    bench.steps(150)
    # Two steps take 68 ms, 34 ms more than one: 28 tokens, and the 16 that are free.
    lengths = [sum(map(int, re.findall(r"p(\d+)", step))) for step in bench.steps(10)]
    assert set(lengths) <= set(range(40, 49))


def test_auto_chunk_takes_the_whole_budget_when_nobody_decodes() -> None:
    bench = make_bench("auto_chunk", max_batch_tokens=64, chunk_size=8)
    bench.add("a", 100)
    assert bench.finish() == ["a64", "a36"]


def test_concatenation_packs_whole_prompts_and_cuts_none_that_fits() -> None:
    bench = make_bench("concatenation")
    for name, length in {"a": 10, "b": 12, "c": 5, "d": 4}.items():
        bench.add(name, length)
    assert bench.finish() == ["a10 c5", "b12 d4"]
    chunked = make_bench("chunked_prefill", chunk_size=16)
    for name, length in {"a": 10, "b": 12, "c": 5, "d": 4}.items():
        chunked.add(name, length)
    assert chunked.finish() == ["a10 b6", "b6 c5 d4"], "what it avoids: b is read in twice"


def test_concatenation_cuts_a_prompt_that_is_longer_than_the_budget() -> None:
    bench = make_bench("concatenation")
    bench.add("a", 20)
    bench.add("b", 12)
    assert bench.finish() == ["a16", "a4 b12"]


def test_priority_classes_serve_the_better_class_first() -> None:
    bench = make_bench("priority_classes", max_running=1, ageing=100)
    bench.add("a", 4, priority=10)
    bench.add("b", 4, priority=0)
    bench.add("c", 4, priority=-10)
    bench.add("d", 4, priority=-25)  # better than the best class: in it
    assert bench.finish() == ["c4", "d4", "b4", "a4"]


def test_priority_classes_age_so_that_nobody_waits_for_ever() -> None:
    bench = make_bench("priority_classes", max_running=1, ageing=5)
    bench.add("batch", 4, priority=10)
    served = []
    for _ in range(14):
        bench.add("premium", 4, priority=-10)
        served.append(bench.step())
    # Two classes apart: those that come in its first 10 seconds overtake it, later ones do not.
    assert served.index("batch4") == 10


def test_deadline_serves_the_least_slack_first_and_the_hopeless_last() -> None:
    bench = make_bench("deadline", max_running=1, ttft_objective=9)
    bench.now = 100.0
    bench.add("lazy", 4, ttft_objective=50)
    bench.add("eager", 4, ttft_objective=3)
    bench.add("usual", 4)
    bench.add("hopeless", 4, ttft_objective=0.5)
    bench.now += 1
    assert bench.finish() == ["eager4", "usual4", "lazy4", "hopeless4"]


def test_deadline_overtakes_nobody_past_the_bound() -> None:
    bench = make_bench("deadline", max_running=1, waiting_bound=6)
    bench.add("hopeless", 4, ttft_objective=0.5)
    bench.now += 1
    served = []
    for _ in range(9):
        bench.add("new", 4)
        served.append(bench.step())
    assert served.index("hopeless4") == 5


def test_deadline_cuts_chunks_to_the_tightest_inter_token_objective() -> None:
    bench = make_bench("deadline", max_batch_tokens=512, chunk_size=64)
    bench.seconds = lambda work: 0.010 + 0.0005 * work.prompt_tokens
    bench.add("warm", 20, output=15)
    bench.steps(5)
    bench.add("up", 50)
    bench.finish()
    bench.add("a", 4, output=30, itl_objective=0.080)
    bench.add("b", 4, output=30, itl_objective=0.0502)
    bench.steps(2)
    bench.add("long", 400)
    # b wants its next token within 50 ms, of which 10 are fixed: room for 80 tokens at 0.5 ms.
    assert bench.steps(2) == ["b1 a1 long80", "b1 a1 long80"]


def test_fair_share_does_not_let_a_flood_push_others_aside() -> None:
    bench = make_bench("fair_share", max_running=1)
    for index in range(6):
        bench.add(f"f{index}-", 8, tenant="flood")
    bench.add("q", 8, tenant="quiet")
    bench.add("r", 8, tenant="quiet")
    assert bench.steps(4) == ["f0-8", "q8", "f1-8", "r8"]


def test_fair_share_serves_by_weight() -> None:
    bench = make_bench("fair_share", max_running=1, tenant_weights="gold=3")
    for _ in range(8):
        bench.add("g", 8, tenant="gold")
        bench.add("b", 8, tenant="bronze")
    served = "".join(line[0] for line in bench.steps(8))
    assert (served.count("g"), served.count("b")) == (6, 2)


def test_fair_share_does_not_save_idleness_up() -> None:
    bench = make_bench("fair_share", max_running=1)
    for _ in range(10):
        bench.add("a", 8, tenant="busy")
    bench.steps(6)
    for _ in range(4):
        bench.add("i", 8, tenant="idle")
    served = "".join(line[0] for line in bench.steps(6))
    assert served.count("i") == 3, "level with the busy one, not five ahead"


def test_fair_share_is_work_conserving() -> None:
    bench = make_bench("fair_share")
    bench.add("a", 16, tenant="alone")
    bench.add("b", 16, tenant="alone")
    assert bench.finish() == ["a8 b8", "a8 b8"]


def test_shortest_prompt_goes_first() -> None:
    bench = make_bench("shortest_prompt", max_running=1, chunk_size=16)
    for name, length in {"a": 12, "b": 3, "c": 7}.items():
        bench.add(name, length)
    assert bench.finish() == ["b3", "c7", "a12"]


def test_shortest_prompt_is_overtaken_no_more_past_the_bound() -> None:
    bench = make_bench("shortest_prompt", max_running=1, chunk_size=16, waiting_bound=4)
    bench.add("long", 12)
    served = []
    for _ in range(8):
        bench.add("short", 3)
        served.append(bench.step())
    assert served.index("long12") == 4


# ------------------------------------------------------------------ choosing a policy


def test_every_policy_says_what_it_optimises_and_what_it_costs() -> None:
    for name, make in POLICIES.items():
        text = make.__doc__ or ""
        assert "ptimise" in text or name == "static_batching", name
        assert "Costs:" in text, name


def test_pools_may_have_policies_of_their_own() -> None:
    config = SchedulerConfig(policy="fair_share", prefill_policy="concatenation")
    assert type(make_policy(config, "prefill")) is POLICIES["concatenation"]
    assert type(make_policy(config, "decode")) is POLICIES["fair_share"]
    assert policy_name(config, "decode") == "fair_share"


def test_an_unknown_policy_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'fifo' is unknown; there are .*chunked_prefill"):
        make_policy(SchedulerConfig(policy="fifo"))


@pytest.mark.parametrize("weights", ["a", "a=x", "=1", "a=1,a=2", "a=0", "a=-1", "a=inf"])
def test_wrong_weights_are_refused(weights: str) -> None:
    with pytest.raises(ValueError, match="tenant_weights"):
        SchedulerConfig(tenant_weights=weights)


PAGE = Path(__file__).parents[2] / "docs/scheduling.md"
BROKEN = """
def broken(config):
    return "not a policy"
"""
BROKEN_ENTRY_POINTS = """
broken = their_policies:broken
missing = their_policies:Nothing
"""


@pytest.fixture
def their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example of docs/scheduling.md, installed: a module and metadata on the path."""
    code = re.search(r"```python\n# their_policies.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    entry = re.search(r'\n(last_come_first) = "(.*?)"\n', PAGE.read_text())
    assert code is not None
    assert entry is not None
    assert f'"{ENTRY_POINT_GROUP}"' in PAGE.read_text()
    (tmp_path / "their_policies.py").write_text(code[1] + BROKEN)
    metadata = tmp_path / "their_policies-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-policies\nVersion: 1.0\n"
    )
    points = f"[{ENTRY_POINT_GROUP}]\n{entry[1]} = {entry[2]}\n{BROKEN_ENTRY_POINTS}"
    (metadata / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_policies", raising=False)


@pytest.mark.usefixtures("their_package")
def test_a_policy_of_another_package_is_found_by_its_entry_point() -> None:
    bench = make_bench("last_come_first")
    for name in "abc":
        bench.add(name, 10, output=2)
    assert bench.finish() == ["c8", "c2", "c1 b8", "b2", "b1 a8", "a2", "a1"]


@pytest.mark.usefixtures("their_package")
@pytest.mark.parametrize(
    ("name", "message"), [("broken", "made no tandem Policy"), ("missing", "cannot be loaded")]
)
def test_a_broken_policy_of_another_package_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*{message}"):
        make_policy(SchedulerConfig(policy=name))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("num_blocks", [22, 200])
def test_steps_are_as_many_tasks(
    name: str, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where blocks, tokens or places are short and somebody is preempted in between."""

    def iterations(seed: int, *, one_by_one: bool) -> list[str]:
        rng = random.Random(seed)
        bench = make_bench(name, num_blocks=num_blocks, max_batch_tokens=6, max_running=10)
        policy = bench.scheduler.policy
        if one_by_one:
            monkeypatch.setattr(policy, "tasks", partial(tasks_of, policy.tasks))
        lines: list[str] = []
        for index in range(14):
            bench.add(chr(97 + index), rng.randint(1, 30), output=rng.randint(1, 25))
            lines += bench.steps(rng.randint(0, 9))
        return lines + bench.finish(5000)

    def tasks_of(tasks: Callable[[View], Iterable[Task | Steps]], view: View) -> Iterable[Task]:
        for wish in tasks(view):
            if isinstance(wish, Steps):
                yield from (Task(seq, 1) for seq in wish.sequences)
            else:
                yield wish

    for seed in range(12):
        assert iterations(seed, one_by_one=True) == iterations(seed, one_by_one=False)


class Hostile(Policy):
    """Asks for everything that it must not get."""

    def tasks(self, view: View) -> Iterable[Task]:
        everyone = [*view.waiting, *view.running]
        for seq in [*everyone, *everyone]:
            yield Task(seq, 0)
            yield Task(seq, -5)
            yield Task(seq, 10**9)


def test_a_policy_cannot_break_a_limit() -> None:
    bench = make_bench(Hostile(), num_blocks=14, max_running=3)
    strangers = [bench.add(name, 10, output=9) for name in "abcde"]
    bench.scheduler.withdraw(strangers[4])
    lines = bench.finish()
    assert all(sum(int(part[1:]) for part in line.split()) <= 16 for line in lines)
    assert all(len({part[0] for part in line.split()}) <= 3 for line in lines)
    assert [seq.phase for seq in strangers] == ["finished"] * 4 + ["waiting"]
    assert bench.scheduler.pool.num_used == 0
