"""A still picture of a timeline for documents: one row per worker, one box per iteration.

One SVG without outside parts, readable anywhere; titles show on hover. What one can zoom and move
is `page`.
"""

from __future__ import annotations

import math
from html import escape
from typing import TypeVar

from tandem.timeline.events import Iteration, Timeline, Transfer

COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1",
    "#76b7b2", "#edc948", "#ff9da7", "#9c755f", "#86bcb6",
)  # fmt: skip
_ROW, _GAP, _LEFT, _TOP = 64, 26, 92, 26


def render_svg(
    timeline: Timeline,
    workers: list[str],
    width: int = 900,
    seconds: float | None = None,
    start: float = 0.0,
) -> str:
    """Return the picture, `width` pixels wide, of `seconds` (default: all) from `start` on."""
    iterations = [_moved(box, start) for box in timeline.iterations if box.began >= start]
    transfers = [_moved(wire, start) for wire in timeline.transfers if wire.began >= start]
    ends = [box.ended for box in iterations] + [wire.ended for wire in transfers]
    span = seconds or max(ends, default=1.0)
    scale = (width - _LEFT - 8) / span
    tops: dict[str, float] = {name: _TOP + row * (_ROW + _GAP) for row, name in enumerate(workers)}
    height = _TOP + len(workers) * (_ROW + _GAP) + 8
    body = [_axis(span, scale, height)]
    for name, top in tops.items():
        body.append(f'<text x="4" y="{top + _ROW / 2 + 4}" class="w">{escape(name)}</text>')
        body.append(f'<rect x="{_LEFT}" y="{top}" width="{span * scale:.1f}" height="{_ROW}"'
                    ' class="row"/>')  # fmt: skip
    body += [_box(box, tops[box.worker], scale) for box in iterations]
    body += [_wire(t, tops, scale) for t in transfers]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{_STYLE}{"".join(body)}</svg>\n'
    )


Timed = TypeVar("Timed", Iteration, Transfer)


def _moved(timed: Timed, start: float) -> Timed:
    return timed._replace(began=timed.began - start, ended=timed.ended - start)


def colour_of(request: str) -> str:
    """A colour that is the same wherever the request appears."""
    digits = "".join(filter(str.isdigit, request))
    number = int(digits) if digits else sum(map(ord, request))
    return COLOURS[number % len(COLOURS)]


def _box(box: Iteration, top: float, scale: float) -> str:
    """Its sequences stacked: prompt chunks as high as they are long, decode steps thin."""
    left, width = _LEFT + box.began * scale, max((box.ended - box.began) * scale - 0.6, 0.4)
    weights = [max(part.length, 1) ** 0.5 for part in box.parts]
    unit = _ROW / sum(weights)
    pieces, y = [], top
    lines = [f"{box.worker} {box.began * 1e3:.1f}-{box.ended * 1e3:.1f} ms"]
    for part, weight in zip(box.parts, weights, strict=True):
        kind = "decode" if part.is_decode else f"prompt {part.start}-{part.start + part.length}"
        lines.append(f"{part.request}: {kind}")
        shade = ' fill-opacity="0.55"' if part.is_decode else ""
        height = weight * unit
        pieces.append(f'<rect x="{left:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
                      f'fill="{colour_of(part.request)}"{shade}/>')  # fmt: skip
        if width > 22 and height > 11:
            label = part.request if part.is_decode else f"{part.request} +{part.length}"
            if len(label) * 6.2 < width:
                pieces.append(f'<text x="{left + width / 2:.2f}" y="{y + height / 2 + 4:.2f}" '
                              f'class="l">{escape(label)}</text>')  # fmt: skip
        y += height
    return f"<g><title>{escape(chr(10).join(lines))}</title>{''.join(pieces)}</g>"


def _wire(transfer: Transfer, tops: dict[str, float], scale: float) -> str:
    """A line from the sender's row to the receiver's, from first byte to last."""
    down = tops[transfer.receiver] > tops[transfer.sender]
    begin = tops[transfer.sender] + (_ROW if down else 0)
    end = tops[transfer.receiver] + (0 if down else _ROW)
    title = (
        f"KV of {transfer.request}: {transfer.sender} to {transfer.receiver}, "
        f"{transfer.began * 1e3:.1f}-{transfer.ended * 1e3:.1f} ms"
    )
    return (
        f"<g><title>{escape(title)}</title>"
        f'<line x1="{_LEFT + transfer.began * scale:.2f}" y1="{begin}" '
        f'x2="{_LEFT + transfer.ended * scale:.2f}" y2="{end}" '
        f'stroke="{colour_of(transfer.request)}" class="kv"/></g>'
    )


def _axis(span: float, scale: float, height: int) -> str:
    power = 10.0 ** math.floor(math.log10(span / 10))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 10)
    marks = []
    for index in range(int(span / step) + 1):
        x = _LEFT + index * step * scale
        marks.append(f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{height}" class="g"/>')
        label = f"{index * step * 1e3:g} ms" if step < 1 else f"{index * step:g} s"
        marks.append(f'<text x="{x:.1f}" y="{_TOP - 10}" class="t">{label}</text>')
    return "".join(marks)


_STYLE = """<style>
text{font-family:ui-sans-serif,system-ui,sans-serif;font-size:11px;fill:#222}
.t{text-anchor:middle;fill:#666}.l{text-anchor:middle;fill:#fff}.w{font-weight:600}
.row{fill:#f3f3f3}.g{stroke:#ddd;stroke-width:1}
.kv{stroke-width:2;stroke-dasharray:4 2}g:hover rect{stroke:#000;stroke-width:.7}
svg{background:#fff}
</style>"""
