"""docs/scheduling.md: every policy is explained, and its pictures are what the simulator draws."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tandem.core.config import SchedulerConfig
from tandem.scheduler.policies import POLICIES

TRACES = ("azure", "mooncake")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_scheduling", DOCS / "make_scheduling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_fresh(maker: ModuleType) -> None:
    drawn = dict(maker.pictures())
    kept = {path.stem: path.read_text() for path in (DOCS / "images/scheduling").glob("*.svg")}
    assert drawn == kept, "run docs/make_scheduling.py"


def test_the_plot_of_two_tenants_shows_what_the_page_says(maker: ModuleType) -> None:
    fair, unfair = maker.service("fair_share"), maker.service("chunked_prefill")
    end = fair["quiet"][-1][1]
    both_wait = [
        flood - quiet
        for (_, flood), (_, quiet) in zip(fair["flood"], fair["quiet"], strict=True)
        if 0 < quiet < end
    ]
    assert max(both_wait) - min(both_wait) <= 2 * 100  # twice the longest prompt
    flooded = max(total for _, total in unfair["flood"])
    begun = next(i for i, (_, total) in enumerate(unfair["quiet"]) if total > 0)
    assert unfair["flood"][begun][1] > 0.9 * flooded, "first come, first served: quiet waits"


def test_the_page_shows_every_policy_and_names_only_settings_that_exist() -> None:
    page = (DOCS / "scheduling.md").read_text()
    rows = [page.partition(f"<!-- {name} -->")[2].partition("<!-- /")[0] for name in TRACES]
    for name in POLICIES:
        assert f"images/scheduling/{name}.svg" in page
        assert f"\n| `{name}`" in page.partition("<!-- azure -->")[0]
        assert all(f"\n| `{name}` | " in table for table in rows), f"no row for {name}"
    for setting in ("decode_streak", "ageing", "waiting_bound", "auto_chunk_seconds"):
        assert setting in SchedulerConfig.model_fields
        assert f"`{setting}`" in page
