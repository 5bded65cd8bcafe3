"""`make bench-micro`: its engine in a process of its own."""

from __future__ import annotations

from benchmarks.micro import Choice, engine_table, run_engine

from tandem.modelfiles import BUNDLED_MODEL


def test_an_engine_in_a_process_of_its_own_becomes_a_line_of_the_table() -> None:
    choice = Choice("ours", {}, threads=1, batches=(1, 8), runs=1)
    result = run_engine(BUNDLED_MODEL, "float32", choice, prompt=32, context=16, steps=2)
    assert result["prefill"] > 0
    assert set(result["decode"]) == {"1", "8"}
    *_, line = engine_table({choice.label: [result]})
    assert line.startswith(f"| 1, ours | {result['kernels']} | ")
    assert line.endswith(" | – |")
