"""A timeline as a page of its own: zoom with the wheel, move by dragging, hover for details."""

from __future__ import annotations

from html import escape

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{margin:0;font-family:system-ui,sans-serif}}header{{padding:8px 12px}}
#view{{overflow:hidden;cursor:grab}}#view svg{{display:block;width:100%;height:auto}}</style>
</head><body>
<header><b>{title}</b> &middot; wheel: zoom &middot; drag: move &middot; double click: all
&middot; hover: what ran</header>
<div id="view">{svg}</div>
<script>
const svg = document.querySelector("#view svg");
const [, , fullWidth, fullHeight] = svg.getAttribute("viewBox").split(" ").map(Number);
svg.setAttribute("preserveAspectRatio", "none");
svg.style.height = Math.max(fullHeight, 120) + "px";
let left = 0, width = fullWidth;
const show = () => svg.setAttribute("viewBox", [left, 0, width, fullHeight].join(" "));
const clamp = () => {{ left = Math.min(Math.max(left, 0), fullWidth - width); show(); }};
svg.addEventListener("wheel", event => {{
  event.preventDefault();
  const at = event.offsetX / svg.clientWidth;
  const next = Math.min(fullWidth, Math.max(4, width * (event.deltaY > 0 ? 1.2 : 1 / 1.2)));
  left += (width - next) * at; width = next; clamp();
}}, {{passive: false}});
let from = null;
svg.addEventListener("pointerdown", event => {{ from = event.clientX; }});
addEventListener("pointerup", () => {{ from = null; }});
addEventListener("pointermove", event => {{
  if (from === null) return;
  left -= (event.clientX - from) * width / svg.clientWidth; from = event.clientX; clamp();
}});
svg.addEventListener("dblclick", () => {{ left = 0; width = fullWidth; show(); }});
show();
</script></body></html>
"""


def render_page(svg: str, title: str) -> str:
    """Return a self-contained HTML page around a picture."""
    return _PAGE.format(title=escape(title), svg=svg)
