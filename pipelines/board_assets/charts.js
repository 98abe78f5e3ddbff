// What happened and how fast it went, over time. Each mark is also a line of the list below, and each sample a row of a table.

import { bytes, el, milliseconds, rate, seconds, setAttribute, svg } from "./format.js";

/** Shapes, so that marks are told apart without colour; drawn in a box from -6 to 6. */
const SHAPES = {
  plus: "M-5-1.5H-1.5V-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5Z",
  minus: "M-5-1.5H5V1.5H-5Z",
  cross: "M-5-3 -3-5 0-2 3-5 5-3 2 0 5 3 3 5 0 2 -3 5 -5 3 -2 0Z",
  up: "M0-5 5 4H-5Z",
  down: "M0 5 5-4H-5Z",
  square: "M-4-4H4V4H-4Z",
  diamond: "M0-6 5 0 0 6 -5 0Z",
  bar: "M-2-5H2V5H-2Z",
  dot: "M-3.5 0A3.5 3.5 0 1 0 3.5 0 3.5 3.5 0 1 0-3.5 0Z",
};

/** kind: [lane, shape, tone, how it is said] */
export const HAPPENINGS = {
  admitted: ["agents", "plus", "good", "admitted"],
  left: ["agents", "minus", "quiet", "left"],
  refused: ["agents", "cross", "bad", "refused"],
  reserved: ["agents", "square", "good", "reserved"],
  released: ["agents", "minus", "quiet", "released"],
  drift: ["agents", "diamond", "bad", "drift"],
  loaded: ["weights", "up", "good", "loaded"],
  parked: ["weights", "down", "move", "parked"],
  unloaded: ["weights", "minus", "quiet", "unloaded"],
  pool_opened: ["pools", "square", "good", "pool opened"],
  pool_closed: ["pools", "minus", "quiet", "pool closed"],
  swapped_out: ["KV", "down", "move", "swapped out"],
  swapped_in: ["KV", "up", "good", "swapped in"],
  dropped: ["KV", "cross", "bad", "KV dropped"],
  forked: ["KV", "plus", "good", "forked"],
  turn_ended: ["turns", "dot", "good", "turn ended"],
  paused: ["turns", "bar", "move", "stood still"],
  failed: ["turns", "cross", "bad", "failed"],
};
const LANES = ["agents", "weights", "pools", "KV", "turns"];
const known = (kind) => HAPPENINGS[kind] ?? ["agents", "dot", "quiet", kind.replaceAll("_", " ")];

export const laneOf = (kind) => known(kind)[0];
export const said = (kind) => known(kind)[3];

export function mark(kind) {
  const [, shape, tone] = known(kind);
  return svg("svg", { class: "mark", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, svg("path", { d: SHAPES[shape], class: `tone-${tone}` }));
}

export function describe(entry) {
  const parts = [said(entry.kind), entry.agent, entry.model, entry.bytes == null ? null : bytes(entry.bytes)];
  if (entry.ms != null) parts.push(milliseconds(entry.ms));
  return `${parts.filter(Boolean).join(", ")}${entry.text ? `: ${entry.text}` : ""}`;
}

const LEFT = 64, RIGHT = 10, LANE = 26, AXIS = 20;

function axis(width, height, now, range) {
  const marks = [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const x = LEFT + (width - LEFT - RIGHT) * (1 - share);
    const text = share ? `−${seconds(range * share).replace(".0 s", " s")}` : "now";
    const anchor = share === 0 ? "end" : share === 1 ? "start" : "middle";
    return svg("g", {}, svg("line", { x1: x, x2: x, y1: 0, y2: height - AXIS, class: "grid" }), label(x, height - 6, text, anchor));
  });
  return svg("g", { "aria-hidden": "true" }, ...marks);
}

const label = (x, y, text, anchor = "start") => svg("text", { x, y, "text-anchor": anchor, class: "label" }, text);

/** An svg as wide as its place, drawn again with `draw(width)`. */
function canvas(place, height, name) {
  const root = svg("svg", { role: "img", "aria-label": name, height, class: "canvas" });
  place.replaceChildren(root);
  return root;
}

export class Timeline {
  constructor(place) {
    this.place = place;
    this.height = LANES.length * LANE + AXIS;
    this.root = canvas(place, this.height, "");
  }

  show(entries, now, range) {
    const width = Math.max(240, this.place.clientWidth), from = now - range;
    const x = (at) => LEFT + (width - LEFT - RIGHT) * Math.min(1, Math.max(0, (at - from) / range));
    const shown = entries.filter((entry) => entry.at_s >= from);
    const lanes = LANES.map((name, index) => svg("g", { "aria-hidden": "true" },
      svg("line", { x1: LEFT, x2: width - RIGHT, y1: (index + 0.5) * LANE, y2: (index + 0.5) * LANE, class: "lane" }),
      label(0, (index + 0.5) * LANE + 4, name)));
    const last = (entry) => Number(known(entry.kind)[2] === "bad");  // on top, where others are at the same moment
    const marks = [...shown].sort((a, b) => last(a) - last(b)).map((entry) => {
      const [lane, shape, tone] = known(entry.kind);
      const y = (LANES.indexOf(lane) + 0.5) * LANE;
      const took = entry.ms ? svg("line", { x1: x(entry.at_s - entry.ms / 1000), x2: x(entry.at_s), y1: y, y2: y, class: `took tone-${tone}` }) : null;
      const place = svg("path", { d: SHAPES[shape], transform: `translate(${x(entry.at_s)} ${y})`, class: `tone-${tone}` });
      return svg("g", { "data-number": entry.number, "data-kind": entry.kind }, svg("title", {}, describe(entry)), took, place);
    });
    setAttribute(this.root, "viewBox", `0 0 ${width} ${this.height}`);
    setAttribute(this.root, "aria-label", summary(shown, range));
    this.root.replaceChildren(axis(width, this.height, now, range), ...lanes, ...marks);
  }
}

function summary(entries, range) {
  const counts = new Map();
  for (const { kind } of entries) counts.set(kind, (counts.get(kind) ?? 0) + 1);
  const parts = [...counts].map(([kind, count]) => `${count} ${said(kind)}`);
  return `Timeline of the last ${seconds(range)}: ${parts.length ? parts.join(", ") : "nothing happened"}`;
}

export class SpeedChart {
  constructor(place) {
    this.place = place;
    this.height = 130;
    this.root = canvas(place, this.height, "");
  }

  /** `samples`: [at_s, tokens per second since the sample before], oldest first. */
  show(samples, now, range) {
    const width = Math.max(240, this.place.clientWidth), from = now - range, floor = this.height - AXIS;
    const shown = samples.filter(([at], index) => at >= from || (samples[index + 1]?.[0] ?? now) >= from);
    const peak = Math.max(1, ...shown.map(([, speed]) => speed));
    const x = (at) => LEFT + (width - LEFT - RIGHT) * Math.min(1, Math.max(0, (at - from) / range));
    const y = (speed) => floor - (floor - 14) * (speed / peak);
    let line = "", before = null;
    for (const [at, speed] of shown) {  // a sample is the rate since the one before: a step
      line += before == null ? `M${x(at).toFixed(1)} ${y(speed).toFixed(1)}` : `V${y(speed).toFixed(1)}H${x(at).toFixed(1)}`;
      before = at;
    }
    setAttribute(this.root, "viewBox", `0 0 ${width} ${this.height}`);
    setAttribute(this.root, "aria-label", `Tokens per second over the last ${seconds(range)}; at most ${rate(peak)}`);
    const top = svg("g", { "aria-hidden": "true" }, label(0, 18, rate(peak)), label(0, floor, "0"),
      svg("line", { x1: LEFT, x2: width - RIGHT, y1: 14, y2: 14, class: "grid" }));
    const area = line ? svg("path", { d: `${line}V${floor}H${x(shown[0][0]).toFixed(1)}Z`, class: "area" }) : null;
    const stroke = svg("path", { d: line || "M0 0", class: "curve" });
    this.root.replaceChildren(...[axis(width, this.height, now, range), top, area, stroke].filter(Boolean));
  }
}

/** Means over steps of five seconds, newest first. */
export function steps(samples, now, range) {
  const sums = new Map();
  samples.forEach(([at, speed], index) => {
    const passed = index ? at - samples[index - 1][0] : 0, step = Math.floor(at / 5) * 5;
    if (at < now - range || !passed) return;
    const [tokens, time] = sums.get(step) ?? [0, 0];
    sums.set(step, [tokens + speed * passed, time + passed]);
  });
  return [...sums].reverse().map(([at, [tokens, time]]) => ({ at, ago: now - at, speed: tokens / time }));
}

export const glyph = (kind) => el("span", { class: "glyph" }, mark(kind), ` ${said(kind)}`);
