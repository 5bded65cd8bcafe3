"""The page in a real browser: it draws, zooms, moves, says what is under the pointer.

A script that the test adds to the page sends it the events of a mouse and writes down what it
shows; headless Chromium runs it and prints the document.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tandem.timeline.events import Iteration, Part, Stage, Timeline, Transfer
from tandem.timeline.page import render_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1200,700", "--virtual-time-budget=2000", "--dump-dom",
)  # fmt: skip
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)}"),
]

HELPERS = """
const seen = {}, box = () => canvas.getBoundingClientRect();
const mouse = (kind, x, y, more = {}) => canvas.dispatchEvent(new (kind === "wheel" ? WheelEvent
  : PointerEvent)(kind, {clientX: box().left + x, clientY: box().top + y, pointerId: 1,
                         bubbles: true, cancelable: true, ...more}));
canvas.setPointerCapture = () => {};
const view = () => [Number(document.body.dataset.from), Number(document.body.dataset.to)];
const rowY = name => tops.get(name) + 29;
"""


@pytest.fixture
def timeline() -> Timeline:
    return Timeline(
        iterations=[
            Iteration("prefill-0", 0.010, 0.030, (Part("r0", 0, 64), Part("r1", 0, 16))),
            Iteration("decode-0", 0.040, 0.060, (Part("r0", 64, 1, True),)),
            Iteration("decode-0", 0.060, 0.080, (Part("r0", 65, 1, True),)),
        ],
        transfers=[Transfer("prefill-0", "decode-0", "r0", 0.015, 0.035, 0, 64, 0, 3)],
        stages=[Stage("gateway", 0.0, "r0", "received"), Stage("decode-0", 0.1, "r0", "finished")],
    )


def run(timeline: Timeline, script: str, directory: Path) -> dict[str, Any]:
    """Load the page with a script at its end; returns what the script put into `seen`."""
    page = render_page(timeline, ["prefill-0", "decode-0"], "test")
    ending = (
        f"<script>{HELPERS}{script}\ndocument.body.dataset.seen = JSON.stringify(seen);</script>"
    )
    file = directory / "page.html"
    file.write_text(page.replace("</body>", f"{ending}</body>"), encoding="utf-8")
    assert BROWSER is not None
    profile = f"--user-data-dir={directory / 'profile'}"
    command = [BROWSER, *FLAGS, profile, file.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    found = re.search(r'data-seen="([^"]*)"', shown)
    assert found, "a script of the page failed"
    seen: dict[str, Any] = json.loads(found[1].replace("&quot;", '"'))
    return seen


def test_the_wheel_zooms_around_the_pointer_and_everything_comes_back(
    timeline: Timeline, tmp_path: Path
) -> None:
    script = """
    seen.all = view();
    const x = xOf(0.05);
    mouse("wheel", x, 100, {deltaY: -100});
    seen.zoomed = view();
    seen.under = timeAt(x);
    mouse("wheel", x, 100, {deltaY: 100});
    mouse("wheel", x, 100, {deltaY: 100});
    seen.out = view();
    document.getElementById("in").click();
    seen.button = view();
    mouse("dblclick", x, 100);
    dispatchEvent(new KeyboardEvent("keydown", {key: "+"}));
    seen.key = view();
    document.getElementById("all").click();
    seen.back = view();
    """
    seen = run(timeline, script, tmp_path)
    assert seen["all"] == seen["out"] == seen["back"] == [0, 0.1]
    low, high = seen["zoomed"]
    assert high - low == pytest.approx(0.1 / 1.2)
    assert seen["under"] == pytest.approx(0.05), "what is under the pointer stays there"
    for way in ("button", "key"):
        assert seen[way][1] - seen[way][0] == pytest.approx(0.1 / 1.5)


def test_dragging_moves_and_stops_at_the_ends(timeline: Timeline, tmp_path: Path) -> None:
    script = """
    look(0.02, 0.06);
    const pixels = widthOf() / 4;
    mouse("pointerdown", 500, 100);
    mouse("pointermove", 500 - pixels, 100);
    mouse("pointerup", 500 - pixels, 100);
    seen.moved = view();
    mouse("pointerdown", 200, 100);
    mouse("pointermove", 200 + 100000, 100);
    mouse("pointerup", 200, 100);
    seen.start = view();
    """
    seen = run(timeline, script, tmp_path)
    assert seen["moved"] == pytest.approx([0.03, 0.07])
    assert seen["start"] == pytest.approx([0.0, 0.04])


def test_hovering_says_what_ran_and_a_click_follows_a_request(
    timeline: Timeline, tmp_path: Path
) -> None:
    script = """
    const at = (x, y) => { mouse("pointermove", x, y); return tip.textContent; };
    seen.chunk = at(xOf(0.02), tops.get("prefill-0") + 5);
    seen.shown = tip.style.display;
    seen.step = at(xOf(0.05), rowY("decode-0"));
    seen.kv = at((xOf(0.015) + xOf(0.035)) / 2, tops.get("prefill-0") + ROW + GAP / 2);
    seen.life = at(xOf(0.02), lanesTop + 5);
    seen.waiting = at(xOf(0.005), AXIS + QUEUE - 5);
    at(xOf(0.095), rowY("prefill-0"));
    seen.hidden = tip.style.display;
    mouse("pointerdown", xOf(0.05), rowY("decode-0"));
    mouse("pointerup", xOf(0.05), rowY("decode-0"));
    seen.chosen = document.body.dataset.chosen;
    dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
    seen.released = document.body.dataset.chosen;
    """
    seen = run(timeline, script, tmp_path)
    assert "prefill-0, 10.00 ms to 30.00 ms (20.00 ms)" in seen["chunk"]
    assert "r0: chunk, tokens 0 to 63 (64)" in seen["chunk"]
    assert "r1: chunk, tokens 0 to 15 (16)" in seen["chunk"], "what ran together"
    assert "r0: decode at 64" in seen["step"]
    assert "KV of r0, prefill-0 to decode-0" in seen["kv"]
    assert "layers 0 to 2" in seen["kv"]
    assert "r0: prefill 20.00 ms" in seen["life"]
    assert "+10.00 ms  first prefill iteration" in seen["life"]
    assert "waiting for their first iteration" in seen["waiting"]
    assert (seen["shown"], seen["hidden"]) == ("block", "none")
    assert (seen["chosen"], seen["released"]) == ("r0", "")


def test_it_draws_in_light_and_dark_and_labels_what_has_room(
    timeline: Timeline, tmp_path: Path
) -> None:
    script = """
    const written = [], write = pen.fillText.bind(pen);
    pen.fillText = (text, ...rest) => { written.push(text); write(text, ...rest); };
    draw();
    seen.written = written;
    const pixel = (x, y) => [...pen.getImageData(x, y, 1, 1).data];
    seen.chunk = pixel(xOf(0.012), tops.get("prefill-0") + 4);
    seen.row = pixel(xOf(0.09), rowY("prefill-0"));
    """
    seen = run(timeline, script, tmp_path)
    texts = seen["written"]
    for text in ("prefill-0", "decode-0", "waiting", "requests", "0 ms", "r0 +64", "r1 +16", "r0"):
        assert text in texts
    assert any(text.startswith("r0: prefill") for text in texts)
    assert seen["chunk"][:3] == [0x4E, 0x79, 0xA7]
    assert seen["row"] != seen["chunk"]
