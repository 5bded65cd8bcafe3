"""What the comparison of engines makes of the times that it sees."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from benchmarks.peers.cases import LLAMA, MODELS, QWEN, Case, Ceilings, decode_speed
from benchmarks.peers.page import footnote, render_headline, render_table

PREFILL, DECODE_8 = LLAMA.cases


def row(name: str, *runs: dict[str, float], **more: Any) -> dict[str, Any]:
    loaded = [{"load_average": 0.5, "foreign": 0.01, **run} for run in runs]
    return {"name": name, "how": "server", "date": "2026-11-21", "runs": loaded, **more}


def cells(table: str, label: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_decode_counts_only_after_the_last_first_token() -> None:
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 2.5, 3.0, 3.5, 4.0]

    assert decode_speed([early, late], 5) == pytest.approx((2 + 4) / 2.0)


def test_events_that_carry_several_tokens_count_as_such() -> None:
    assert decode_speed([[0.0, 1.0, 2.0, 3.0]], 8) == pytest.approx(3 * 2 / 3.0)


def test_tokens_that_come_all_at_once_have_no_speed() -> None:
    with pytest.raises(ValueError, match="at once"):
        decode_speed([[1.0, 1.0, 1.0]], 3)


def test_prefill_is_prompt_tokens_until_the_first_token() -> None:
    assert PREFILL.speed([[2.0]]) == 512.0


def test_every_engine_gets_the_same_prompts_and_no_turn_repeats_them() -> None:
    first, again = DECODE_8.prompts(32000, 0), DECODE_8.prompts(32000, 0)

    assert first == again
    assert len(first) == 8
    assert all(len(prompt) == 128 and min(prompt) >= 300 for prompt in first)
    asked = product((-1, 0, 1), range(2))
    turns = [prompt for turn, time in asked for prompt in DECODE_8.prompts(32000, turn, time)]
    assert len({tuple(prompt[:16]) for prompt in turns}) == 48


def test_a_table_has_medians_ranges_and_the_ratio_to_the_best_peer() -> None:
    rows = {
        "tandem": row("Tandem", *({"prefill": p, "decode_8": 30.0} for p in (10.0, 30.0, 20.0))),
        "a": row("A", {"prefill": 40.0, "decode_8": 10.0}),
        "b": row("B", {"prefill": 5.0, "decode_8": 12.0}),
    }

    table = render_table(LLAMA, rows)

    assert cells(table, "Tandem (server)") == ["20.0 (10.0 to 30.0)", "**30.0**"]
    assert cells(table, "A (server)") == ["**40.0**", "10.0"]
    assert cells(table, "Tandem / best peer") == ["0.50×", "2.50×"]
    assert cells(table, "aim") == ["–", "≥ 3×"]


def test_an_engine_that_is_not_there_says_why() -> None:
    rows = {"a": row("A", unavailable="no compiler"), "tandem": row("Tandem", {"prefill": 1.0})}

    assert cells(render_table(LLAMA, rows), "A (server)") == ["–", "–"]
    assert cells(render_table(LLAMA, rows), "Tandem / best peer") == ["–", "–"]
    assert "not measured: A: no compiler" in footnote(rows)


def test_figures_of_a_busy_machine_are_marked() -> None:
    quiet, busy = row("A", {"prefill": 1.0}), row("B", {"prefill": 1.0, "foreign": 0.4})

    assert "Not to be relied on" not in footnote({"a": quiet})
    assert "Not to be relied on: other programs took up to 40%" in footnote({"a": quiet, "b": busy})


def test_the_headline_names_the_best_of_the_others() -> None:
    figures = {"prefill": 10.0, "decode_1": 2.0, "decode_8": 3.0, "decode_32": 4.0}
    rows = {
        "tandem": row("Tandem", {name: 2 * value for name, value in figures.items()}),
        "a": row("A", figures),
        "b": row("B", {**figures, "prefill": 5.0, "decode_1": 4.0}),
    }

    table = render_headline(rows)

    assert cells(table, "best of the others") == ["10.0 (A)", "4.0 (B)", "3.0 (A)", "4.0 (A)"]
    assert cells(table, "ratio") == ["2.00×", "1.00×", "2.00×", "2.00×"]


def test_ceilings_are_what_memory_and_arithmetic_allow() -> None:
    machine = Ceilings(read_bytes=100.0, gemm_flops=400.0)
    one, eight = (Case("decode", "", batch, 128, 64) for batch in (1, 8))

    assert machine.speed(one, weight_bytes=50.0, layer_parameters=20.0) == 2.0
    assert machine.speed(eight, weight_bytes=50.0, layer_parameters=20.0) == 8.0
    assert machine.speed(PREFILL, weight_bytes=50.0, layer_parameters=20.0) == 10.0


def test_the_aims_are_those_of_columns_that_exist() -> None:
    assert [case.aim for case in QWEN.cases] == [1.0, 1.15, 1.6, None]
    assert all(len({case.key for case in model.cases}) == len(model.cases) for model in MODELS)
