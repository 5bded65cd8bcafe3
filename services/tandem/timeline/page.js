"use strict";
// Draws the timeline of the page: a row per worker, the KV between the rows, a lane per request.
// All times are seconds from the start of the picture. What is drawn can be hit by the pointer.

const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("view"), tip = document.getElementById("tip");
const pen = canvas.getContext("2d");
const COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1",
                 "#76b7b2", "#edc948", "#ff9da7", "#9c755f", "#86bcb6"];
const LEFT = 118, RIGHT = 14, AXIS = 26, ROW = 58, GAP = 40, QUEUE = 34, LANE = 19, PAD = 10;
const OFTEN = 0.6;  // boxes narrower than this many pixels are drawn once per pixel
let from = 0, to = data.seconds, chosen = null, hovered = null, hits = [];

const colourOf = request => COLOURS[data.requests.indexOf(request) % COLOURS.length];
const colours = new Map(data.requests.map(name => [name, colourOf(name)]));
const theme = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const time = seconds => {
  const size = Math.abs(seconds);
  if (size >= 10) return seconds.toFixed(2) + " s";
  return (seconds * 1e3).toFixed(size < 0.01 ? 3 : 2) + " ms";
};
const short = name => name.length > 14 ? name.slice(0, 6) + "…" + name.slice(-6) : name;
const inkOn = colour => {
  const [r, g, b] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  return r * 0.3 + g * 0.59 + b * 0.11 > 140 ? "#111" : "#fff";
};

// ---- what is derived from the events: the life of each request, the lanes, the queue

function livesOf() {
  const lives = new Map(data.requests.map(name => [name, {name, stages: [], chunks: [], steps: []}]));
  for (const [process, at, name, stage] of data.stages)
    lives.get(name).stages.push({process, at, stage});
  for (const [worker, began, ended, parts] of data.iterations)
    for (const [name, start, length, isDecode] of parts)
      lives.get(name)[isDecode ? "steps" : "chunks"].push({worker, began, ended, start, length});
  const whole = [];
  for (const life of lives.values()) {
    const {stages, chunks, steps} = life, work = [...chunks, ...steps];
    if (!work.length && !stages.length) continue;
    const times = [...stages.map(s => s.at), ...work.map(w => w.began), ...work.map(w => w.ended)];
    life.begin = times.reduce((a, b) => Math.min(a, b));
    life.end = times.reduce((a, b) => Math.max(a, b));
    const first = chunks[0] || steps[0];
    life.starts = first ? first.began : life.end;
    const prefills = steps.length ? chunks.filter(c => c.ended <= steps[0].began + 1e-9) : chunks;
    life.computed = prefills.length ? prefills[prefills.length - 1].ended : life.starts;
    life.decodes = steps.length ? Math.max(steps[0].began, life.computed) : life.end;
    whole.push(life);
  }
  whole.sort((a, b) => a.begin - b.begin);
  const ends = [];
  for (const life of whole) {  // lanes are shared by requests that do not overlap
    let lane = ends.findIndex(end => end + data.seconds * 0.01 < life.begin);
    if (lane < 0) lane = ends.length;
    ends[lane] = life.end;
    life.lane = lane;
  }
  return {lives: whole, lanes: ends.length};
}

function queueOf(lives) {
  const changes = [];
  for (const life of lives) changes.push([life.begin, 1], [life.starts, -1]);
  changes.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  let waiting = 0;
  return changes.map(([at, change]) => [at, waiting += change]);
}

const {lives, lanes} = livesOf(), queue = queueOf(lives);
const byName = new Map(lives.map(life => [life.name, life]));
const tops = new Map(data.workers.map((name, row) => [name, AXIS + QUEUE + GAP + row * (ROW + GAP)]));
const lanesTop = AXIS + QUEUE + GAP + data.workers.length * (ROW + GAP);
const height = lanesTop + lanes * LANE + 16;

// ---- drawing

const widthOf = () => canvas.clientWidth - LEFT - RIGHT;
const xOf = at => LEFT + (at - from) / (to - from) * widthOf();
const timeAt = x => from + (x - LEFT) / widthOf() * (to - from);
const faded = request => chosen !== null && request !== chosen;

function draw() {
  const scale = devicePixelRatio || 1;
  canvas.style.height = height + "px";
  canvas.width = canvas.clientWidth * scale;
  canvas.height = height * scale;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.font = "12px system-ui, sans-serif";
  pen.textBaseline = "middle";
  hits = [];
  drawAxis();
  for (const [name, top] of tops) {
    pen.fillStyle = theme("--row");
    pen.fillRect(LEFT, top, widthOf(), ROW);
    label(name, top + ROW / 2, true);
  }
  label("waiting", AXIS + QUEUE / 2 + 4);
  if (lanes) label("requests", lanesTop + LANE / 2);
  pen.save();
  pen.beginPath();
  pen.rect(LEFT, 0, widthOf(), height);
  pen.clip();
  drawQueue();
  drawIterations();
  drawTransfers();
  lives.forEach(drawLife);
  pen.restore();
  document.body.dataset.from = from;
  document.body.dataset.to = to;
  document.body.dataset.chosen = chosen ?? "";
}

function label(text, y, strong) {
  pen.fillStyle = strong ? theme("--ink") : theme("--dim");
  pen.font = (strong ? "600 " : "") + "12px system-ui, sans-serif";
  pen.textAlign = "left";
  pen.fillText(text, 14, y, LEFT - 20);
  pen.font = "12px system-ui, sans-serif";
}

function drawAxis() {
  const rough = (to - from) / Math.max(2, widthOf() / 110), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const unit = to >= 10 && step >= 0.1 ? [1, "s"] : step >= 1e-4 ? [1e3, "ms"] : [1e6, "µs"];
  const digits = Math.max(0, -Math.floor(Math.log10(step * unit[0]) + 1e-9));
  pen.textAlign = "center";
  for (let n = Math.ceil(from / step); n * step <= to; n++) {
    const x = xOf(n * step);
    pen.fillStyle = theme("--grid");
    pen.fillRect(x, AXIS - 6, 1, height);
    pen.fillStyle = theme("--dim");
    pen.fillText((n * step * unit[0]).toFixed(digits) + " " + unit[1], Math.max(x, LEFT + 12), 11);
  }
}

function drawQueue() {
  const most = Math.max(1, ...queue.map(([, waiting]) => waiting)), base = AXIS + QUEUE;
  pen.fillStyle = theme("--wait");
  queue.forEach(([at, waiting], index) => {
    const until = index + 1 < queue.length ? queue[index + 1][0] : at;
    if (!waiting || until < from || at > to) return;
    const left = xOf(at), wide = Math.max(xOf(until) - left, 0.5), tall = waiting / most * (QUEUE - 8);
    pen.fillRect(left, base - tall, wide, tall);
    hits.push({x: left, y: base - QUEUE, w: Math.max(wide, 2), h: QUEUE,
               text: `${waiting} waiting for their first iteration`});
  });
  pen.fillStyle = theme("--edge");
  pen.fillRect(LEFT, base, widthOf(), 1);
}

function drawIterations() {
  const reached = new Map();
  for (const box of data.iterations) {
    const [worker, began, ended, parts] = box;
    if (ended < from || began > to) continue;
    const left = xOf(began), right = xOf(ended), top = tops.get(worker);
    if (right - left < OFTEN && right < (reached.get(worker) ?? -1)) continue;
    reached.set(worker, left + OFTEN);
    const wide = Math.max(right - left - (right - left > 3 ? 1 : 0), OFTEN);
    const total = parts.reduce((sum, part) => sum + Math.sqrt(part[2]), 0);
    let y = top;
    for (const part of parts) {
      const tall = Math.sqrt(part[2]) / total * ROW;
      drawPart(part, left, y, wide, tall);
      hits.push({x: left, y, w: Math.max(wide, 2), h: tall, request: part[0], box, part});
      y += tall;
    }
  }
}

function drawPart([request, , length, isDecode], x, y, wide, tall) {
  const colour = colours.get(request);
  pen.globalAlpha = (isDecode ? 0.45 : 1) * (faded(request) ? 0.15 : 1);
  pen.fillStyle = colour;
  pen.fillRect(x, y, wide, tall - (tall > 3 ? 0.7 : 0));
  pen.globalAlpha = faded(request) ? 0.25 : 1;
  const text = isDecode ? short(request) : `${short(request)} +${length}`;
  const visible = Math.min(x + wide, canvas.clientWidth - RIGHT) - Math.max(x, LEFT);
  if (tall > 12 && visible > 14 && pen.measureText(text).width < visible - 6) {
    pen.fillStyle = isDecode ? theme("--ink") : inkOn(colour);
    pen.textAlign = "center";
    pen.fillText(text, Math.max(x, LEFT) + visible / 2, y + tall / 2);
  }
  pen.globalAlpha = 1;
}

function drawTransfers() {
  for (const kv of data.transfers) {
    if (kv.ended < from || kv.began > to) continue;
    const down = tops.get(kv.receiver) > tops.get(kv.sender);
    const y1 = tops.get(kv.sender) + (down ? ROW : 0), y2 = tops.get(kv.receiver) + (down ? 0 : ROW);
    const x1 = xOf(kv.began), x2 = xOf(kv.ended), mine = hovered && hovered.kv === kv;
    pen.globalAlpha = faded(kv.request) ? 0.12 : 1;
    pen.strokeStyle = colours.get(kv.request) ?? theme("--dim");
    pen.lineWidth = mine ? 3.5 : 1.6;
    pen.beginPath();
    pen.moveTo(x1, y1);
    pen.lineTo(x2, y2);
    pen.stroke();
    pen.fillStyle = pen.strokeStyle;
    const size = 3, flip = down ? -1 : 1;
    pen.beginPath();  // an arrow's head where it lands
    pen.moveTo(x2, y2);
    pen.lineTo(x2 - size, y2 + flip * size * 2);
    pen.lineTo(x2 + size, y2 + flip * size * 2);
    pen.fill();
    pen.globalAlpha = 1;
    hits.push({line: [x1, y1, x2, y2], request: kv.request, kv});
  }
}

function drawLife(life) {
  if (life.end < from || life.begin > to) return;
  const y = lanesTop + life.lane * LANE, tall = LANE - 5, colour = colours.get(life.name);
  const spans = [
    ["waiting", life.begin, life.starts, theme("--wait"), 1, 0.3],
    ["prefill", life.starts, life.computed, colour, 1, 1],
    ["hand-over", life.computed, life.decodes, colour, 0.7, 0.35],
    ["decode", life.decodes, life.end, colour, 0.45, 1],
  ];
  for (const [phase, began, ended, fill, alpha, high] of spans) {
    if (ended <= began) continue;
    const x = xOf(began), wide = Math.max(xOf(ended) - x, 1);
    pen.globalAlpha = alpha * (faded(life.name) ? 0.2 : 1);
    pen.fillStyle = fill;
    pen.fillRect(x, y + tall * (1 - high) / 2, wide, tall * high);
    pen.globalAlpha = faded(life.name) ? 0.3 : 1;
    const text = `${short(life.name)}: ${phase} ${time(ended - began)}`;
    const visible = Math.min(x + wide, canvas.clientWidth - RIGHT) - Math.max(x, LEFT);
    if (high === 1 && pen.measureText(text).width < visible - 8) {
      pen.fillStyle = alpha === 1 ? inkOn(colour) : theme("--ink");
      pen.textAlign = "left";
      pen.fillText(text, Math.max(x, LEFT) + 4, y + tall / 2);
    }
    hits.push({x, y, w: wide, h: tall, request: life.name, life, phase, seconds: ended - began});
  }
  pen.globalAlpha = faded(life.name) ? 0.2 : 1;
  pen.fillStyle = theme("--ink");
  for (const {at} of life.stages)
    if (at >= from && at <= to) pen.fillRect(xOf(at) - 0.5, y + tall - 2, 1, 5);
  pen.globalAlpha = 1;
}
