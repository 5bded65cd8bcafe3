"""The page of a timeline: complete, self-contained, and whatever a name holds is only text."""

from __future__ import annotations

import json
import re
from typing import Any

from tandem.timeline.events import Iteration, Part, Stage, Timeline, Transfer
from tandem.timeline.page import render_page

WORKERS = ["prefill-0", "decode-0"]


def one_request(name: str = "r0") -> Timeline:
    return Timeline(
        iterations=[
            Iteration("prefill-0", 10.001, 10.004, (Part(name, 0, 16),)),
            Iteration("decode-0", 10.006, 10.007, (Part(name, 16, 1, True),)),
        ],
        transfers=[Transfer("prefill-0", "decode-0", name, 10.002, 10.005, 0, 16, 0, 2)],
        stages=[
            Stage("gateway", 10.0, name, "received"),
            Stage("decode-0", 10.0055, name, "joined"),
        ],
    )


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_holds_every_event_on_a_scale_that_begins_with_the_first() -> None:
    data = data_of(render_page(one_request(), WORKERS, "t"))
    assert data["workers"] == WORKERS
    assert data["requests"] == ["r0"]
    assert data["seconds"] == 0.007
    assert data["iterations"] == [
        ["prefill-0", 0.001, 0.004, [["r0", 0, 16, False]]],
        ["decode-0", 0.006, 0.007, [["r0", 16, 1, True]]],
    ]
    (kv,) = data["transfers"]
    assert (kv["sender"], kv["receiver"], kv["began"], kv["ended"]) == (*WORKERS, 0.002, 0.005)
    assert (kv["start"], kv["length"], kv["first_layer"], kv["num_layers"]) == (0, 16, 0, 2)
    assert data["stages"] == [
        ["gateway", 0, "r0", "received"],
        ["decode-0", 0.0055, "r0", "joined"],
    ]


def test_the_page_needs_nothing_from_outside() -> None:
    page = render_page(one_request(), WORKERS, "t")
    assert "http" not in page
    assert not re.search(r"\b(src|href)=|@import|fetch\(", page)
    assert not re.search("@(title|note|data|script)@", page)


def test_names_cannot_break_out_of_the_page() -> None:
    name = "</script><script>alert(1)</script>@title@"
    page = render_page(one_request(name), WORKERS, "<b>", "a & b")
    assert data_of(page)["requests"] == [name]
    assert "<script>alert" not in page
    assert "&lt;b&gt;" in page
    assert "a &amp; b" in page


def test_what_has_no_row_is_left_out_and_nothing_at_all_is_a_page_too() -> None:
    data = data_of(render_page(one_request(), ["prefill-0"], "t"))
    assert [box[0] for box in data["iterations"]] == ["prefill-0"]
    assert data["transfers"] == []
    assert data_of(render_page(Timeline(), [], "t"))["seconds"] > 0
