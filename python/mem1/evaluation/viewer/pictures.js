"use strict";

// Okabe and Ito's palette, which colour-blind readers can tell apart; as in mem1_core.plot.
const COLOURS = new Map([
  ["prompt", "#999999"],
  ["state", "#0072b2"],
  ["query", "#e69f00"],
  ["answer", "#cc79a7"],
  ["info", "#009e73"],
]);
const OTHERS = ["#d55e00", "#56b4e9", "#f0e442"]; // of actions of other kinds, in turn

/** The colour of a kind of part. */
function colourOf(kind) {
  if (!COLOURS.has(kind)) COLOURS.set(kind, OTHERS[COLOURS.size % OTHERS.length]);
  return COLOURS.get(kind);
}

/** What a kind of part is called. */
function kindName(kind) {
  return kind === "info" ? "observation" : kind;
}

/** The value of a colour of the style sheet, which depends on light and dark. */
function themed(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Draw who sees whom: queries down, keys across. A part is the region between the diagonal, where its tokens
 * are written, and the first query that does not see them; below it they are pruned.
 */
function drawMask(canvas, trajectory, query) {
  const ratio = window.devicePixelRatio || 1;
  const side = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.width = canvas.height = side;
  const pen = canvas.getContext("2d");
  const at = (token) => Math.round((token / Math.max(1, trajectory.length)) * side);
  const fill = (colour, ...corners) => {
    pen.fillStyle = colour;
    pen.beginPath();
    for (const [x, y] of corners) pen.lineTo(x, y);
    pen.fill();
  };
  fill(themed("--pruned"), [0, 0], [side, side], [0, side]);
  for (const { kind, begin, end, evict } of trajectory.parts) {
    const [left, right, bottom] = [at(begin), at(end), at(evict)];
    fill(colourOf(kind), [left, left], [right, right], [right, bottom], [left, bottom]);
  }
  pen.strokeStyle = themed("--text");
  pen.globalAlpha = 0.35;
  pen.lineWidth = 1;
  pen.setLineDash([ratio, 2 * ratio]);
  for (const { begin } of trajectory.turns.slice(1)) {
    const place = at(begin) + 0.5;
    line(pen, 0, place, side, place);
    line(pen, place, 0, place, side);
  }
  pen.setLineDash([]);
  pen.globalAlpha = 1;
  pen.strokeStyle = themed("--accent");
  pen.lineWidth = 1.5 * ratio;
  const now = Math.min(at(query + 0.5), side - ratio);
  line(pen, 0, now, side, now);
}

function line(pen, x, y, toX, toY) {
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(toX, toY);
  pen.stroke();
}

/** The [query, key] under a pointer on the canvas. */
function pairAt(canvas, trajectory, event) {
  const { left, top, width, height } = canvas.getBoundingClientRect();
  const token = (share) =>
    Math.min(trajectory.length - 1, Math.max(0, Math.floor(share * trajectory.length)));
  return [token((event.clientY - top) / height), token((event.clientX - left) / width)];
}

const CHART = { width: 340, height: 110, left: 34, right: 6, top: 8, bottom: 18 };

/** Draw how many tokens are live, and how many would be if none had left. */
function drawLive(svg, trajectory, query) {
  const { width, height, left, right, top, bottom } = CHART;
  const { live, length } = trajectory;
  const peak = live.reduce((most, count) => Math.max(most, count), 0);
  const highest = Math.max(1, Math.min(length, Math.ceil(peak * 1.6)));
  const x = (token) => left + (token / Math.max(1, length)) * (width - left - right);
  const y = (count) => height - bottom - (count / highest) * (height - top - bottom);
  const columns = Math.min(length, 300);
  let curve = `M${x(0)},${y(0)}`;
  for (let column = 0; column < columns; column++) {
    const [begin, end] = [column, column + 1].map((n) => Math.floor((n * length) / columns));
    const most = live.subarray(begin, end).reduce((found, count) => Math.max(found, count), 0);
    curve += `L${x(begin).toFixed(1)},${y(most).toFixed(1)}L${x(end).toFixed(1)},${y(most).toFixed(1)}`;
  }
  svg.replaceChildren();
  for (const { begin } of trajectory.turns.slice(1))
    stroke(svg, "border", x(begin), y(highest), x(begin), y(0));
  drawn(svg, "path", { class: "area", d: `${curve}L${x(length)},${y(0)}Z` });
  stroke(svg, "all", x(0), y(0), x(highest), y(highest));
  stroke(svg, "peak", x(0), y(peak), x(length), y(peak));
  stroke(svg, "axis", x(0), y(0), x(length), y(0));
  label(svg, left - 4, y(peak) + 4, "end", formatted(peak));
  label(svg, left - 4, y(0) + 4, "end", "0");
  label(svg, x(length), height - 4, "end", `${formatted(length)} tokens`);
  if (highest < length) label(svg, x(highest) + 5, y(highest) + 8, "start", "if none had left");
  stroke(svg, "now", x(query + 0.5), y(highest), x(query + 0.5), y(0));
  drawn(svg, "circle", { class: "now", cx: x(query + 0.5), cy: y(live[query]), r: 3.5 });
}

/** The token under a pointer on the chart. */
function tokenAt(svg, trajectory, event) {
  const box = svg.getBoundingClientRect();
  const { width, left, right } = CHART;
  const share = (((event.clientX - box.left) / box.width) * width - left) / (width - left - right);
  return Math.min(trajectory.length - 1, Math.max(0, Math.floor(share * trajectory.length)));
}

function drawn(svg, tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  svg.append(element);
  return element;
}

function stroke(svg, name, x1, y1, x2, y2) {
  drawn(svg, "line", { class: name, x1, y1, x2, y2 });
}

function label(svg, x, y, anchor, text) {
  drawn(svg, "text", { x, y, "text-anchor": anchor }).textContent = text;
}
