"use strict";
// What the pointer is on, in words, and moving about in the picture that `page.js` draws.

function near([x1, y1, x2, y2], x, y) {
  const length = (x2 - x1) ** 2 + (y2 - y1) ** 2 || 1;
  const t = Math.min(1, Math.max(0, ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length));
  return Math.hypot(x - x1 - t * (x2 - x1), y - y1 - t * (y2 - y1)) < 5;
}

function hitAt(x, y) {
  if (x < LEFT) return null;
  return hits.findLast(hit => hit.line ? near(hit.line, x, y)
    : x >= hit.x && x <= hit.x + hit.w && y >= hit.y && y <= hit.y + hit.h) ?? null;
}

const span = (began, ended) => `${time(began)} to ${time(ended)} (${time(ended - began)})`;
const tokens = (start, length) => `tokens ${start} to ${start + length - 1} (${length})`;

function describe(hit) {
  if (hit.text) return hit.text;
  if (hit.kv) return describeTransfer(hit.kv);
  if (hit.life) return describeLife(hit);
  const [worker, began, ended, parts] = hit.box, lines = [`${worker}, ${span(began, ended)}`];
  for (const [request, start, length, isDecode] of parts.slice(0, 24)) {
    const mark = request === hit.request ? "▸ " : "   ";
    lines.push(mark + request + ": " + (isDecode ? `decode at ${start}` : "chunk, " + tokens(start, length)));
  }
  if (parts.length > 24) lines.push(`   and ${parts.length - 24} more`);
  return lines.join("\n");
}

function describeTransfer(kv) {
  const lines = [`KV of ${kv.request}, ${kv.sender} to ${kv.receiver}`, span(kv.began, kv.ended)];
  if (kv.length) lines.push(tokens(kv.start, kv.length));
  if (kv.num_layers) lines.push(`layers ${kv.first_layer} to ${kv.first_layer + kv.num_layers - 1}`);
  if (kv.sent !== null)
    lines.push(`packed +${time(kv.packed - kv.began)}, announced +${time(kv.announced - kv.packed)}`,
               `sent +${time(kv.sent - kv.announced)}, landed +${time(kv.ended - kv.sent)}`);
  return lines.join("\n");
}

function describeLife({life, phase, seconds}) {
  const lines = [`${life.name}: ${phase} ${time(seconds)}`];
  const marks = life.stages.map(({process, at, stage}) => [at, `${stage} (${process})`]);
  if (life.chunks.length) marks.push([life.starts, "first prefill iteration"],
                                     [life.computed, "last chunk computed"]);
  if (life.steps.length) marks.push([life.steps[0].began, "first decode iteration"]);
  marks.sort((a, b) => a[0] - b[0]);
  for (const [at, what] of marks) lines.push(`+${time(at - life.begin)}  ${what}`);
  return lines.join("\n");
}

// ---- moving about

function look(begin, end) {
  const least = 2e-5, wide = Math.min(Math.max(end - begin, least), data.seconds);
  from = Math.min(Math.max(begin, 0), data.seconds - wide);
  to = from + wide;
  draw();
}
const zoom = (factor, at = (from + to) / 2) => look(at - (at - from) * factor, at + (to - at) * factor);
const move = share => look(from + share * (to - from), to + share * (to - from));

canvas.addEventListener("wheel", event => {
  event.preventDefault();
  if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY))
    move((event.deltaX || event.deltaY) / 1000);
  else zoom(1.2 ** Math.sign(event.deltaY), timeAt(event.offsetX));
}, {passive: false});
let grabbed = null;
canvas.addEventListener("pointerdown", event => {
  grabbed = {x: event.clientX, from, moved: false};
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointerup", event => {
  canvas.classList.remove("dragging");
  if (grabbed && !grabbed.moved) {
    const request = hitAt(event.offsetX, event.offsetY)?.request ?? null;
    chosen = request === chosen ? null : request;
    draw();
  }
  grabbed = null;
});
canvas.addEventListener("pointermove", event => {
  if (grabbed) {
    const moved = event.clientX - grabbed.x;
    grabbed.moved ||= Math.abs(moved) > 3;
    canvas.classList.toggle("dragging", grabbed.moved);
    if (grabbed.moved) {
      const begin = grabbed.from - moved / widthOf() * (to - from);
      look(begin, begin + to - from);
    }
    return;
  }
  const hit = hitAt(event.offsetX, event.offsetY), changed = hit?.kv !== hovered?.kv;
  hovered = hit;
  if (changed) draw();
  tip.style.display = hit ? "block" : "none";
  if (!hit) return;
  tip.textContent = describe(hit);
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6)) + "px";
  const below = event.clientY + 16, fits = below + tip.offsetHeight < innerHeight;
  tip.style.top = (fits ? below : Math.max(4, event.clientY - tip.offsetHeight - 12)) + "px";
});
canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
canvas.addEventListener("dblclick", () => look(0, data.seconds));
addEventListener("keydown", event => {
  const keys = {"+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5),
                "0": () => look(0, data.seconds), ArrowLeft: () => move(-0.2),
                ArrowRight: () => move(0.2), Escape: () => { chosen = null; draw(); }};
  if (keys[event.key] && !event.ctrlKey && !event.metaKey) { event.preventDefault(); keys[event.key](); }
});
document.getElementById("in").onclick = () => zoom(1 / 1.5);
document.getElementById("out").onclick = () => zoom(1.5);
document.getElementById("all").onclick = () => look(0, data.seconds);
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
