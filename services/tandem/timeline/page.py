"""A timeline as a page of its own: one HTML file that needs no server and loads nothing.

The events go into the page as they are, on a scale that begins with the picture; `page.js` draws
them and `page_pointer.js` says what is under the pointer. Zoom with the wheel, move by dragging.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from tandem.timeline.events import Timeline

_SCRIPTS = ("page.js", "page_pointer.js")
_HOLE = re.compile("@(title|note|data|script)@")


def render_page(timeline: Timeline, workers: Sequence[str], title: str, note: str = "") -> str:
    """Return the page: a row per worker in the order given, and a lane per request.

    `note` says what a reader must know of how it was recorded. Events of workers that have no row
    are left out.
    """
    here = files("tandem.timeline")
    contents = {
        "title": escape(title),
        "note": escape(note),
        # A name must not begin or end an element of the page.
        "data": json.dumps(_data(timeline, workers), separators=(",", ":")).replace("<", "\\u003c"),
        "script": "".join(here.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS),
    }
    template = here.joinpath("page.html").read_text(encoding="utf-8")
    return _HOLE.sub(lambda hole: contents[hole[1]], template)


def _data(timeline: Timeline, workers: Sequence[str]) -> dict[str, Any]:
    """What `page.js` reads."""
    start, end = timeline.span()
    rows = set(workers)
    iterations = [
        (box.worker, _at(box.began, start), _at(box.ended, start), box.parts)
        for box in sorted(timeline.iterations, key=lambda box: box.began)
        if box.worker in rows
    ]
    transfers = [
        {
            name: _at(value, start) if isinstance(value, float) else value
            for name, value in transfer._asdict().items()
        }
        for transfer in timeline.transfers
        if transfer.sender in rows and transfer.receiver in rows
    ]
    stages = [
        (stage.process, _at(stage.at, start), stage.request, stage.name)
        for stage in sorted(timeline.stages, key=lambda stage: stage.at)
    ]
    named = [stage[2] for stage in stages]
    named += [part.request for box in iterations for part in box[3]]
    return {
        "workers": list(workers),
        "seconds": max(_at(end, start), 1e-6),
        "requests": list(dict.fromkeys(named)),
        "iterations": iterations,
        "transfers": transfers,
        "stages": stages,
    }


def _at(when: float, start: float) -> float:
    """Microseconds are kept; what a picture does not show would only make the file larger."""
    return round(when - start, 7)
