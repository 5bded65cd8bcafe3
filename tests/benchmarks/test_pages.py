"""Generated parts of pages, and the results that they are made from."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.pages import DOCS, README, replace_part
from benchmarks.results import merge, read_results, write_results

PAGE = "before\n<!-- generated: a -->\nold\n<!-- end: a -->\nafter\n"


def test_only_what_is_between_the_markers_is_replaced() -> None:
    once = replace_part(PAGE, "a", "new\n\n")

    assert once == "before\n<!-- generated: a -->\nnew\n<!-- end: a -->\nafter\n"
    assert replace_part(once, "a", "new") == once


@pytest.mark.parametrize("page", ["nothing", PAGE + PAGE, "<!-- end: a --><!-- generated: a -->"])
def test_a_page_without_clear_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="generated: a"):
        replace_part(page, "a", "new")


def test_the_pages_have_all_markers() -> None:
    performance = (DOCS / "performance.md").read_text(encoding="utf-8")
    for name in ("peers machine", "peers qwen", "peers llama-15m", "cluster", "interference"):
        assert f"<!-- generated: {name} -->" in performance
    readme = README.read_text(encoding="utf-8")
    for name in ("peers headline", "cluster headline"):
        assert f"<!-- generated: {name} -->" in readme


def test_new_rows_replace_their_own_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "kept" / "results.json"
    assert read_results(file) == {}
    write_results(file, {"qwen": {"a": {"x": 1, "old": 1}, "b": {"x": 2}}, "llama": {"a": {}}})

    merged = merge(read_results(file), {"qwen": {"a": {"x": 3}}, "machine": {"cores": 2}})

    assert merged == {
        "qwen": {"a": {"x": 3}, "b": {"x": 2}},
        "llama": {"a": {}},
        "machine": {"cores": 2},
    }
