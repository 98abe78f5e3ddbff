// The live page: one stream of events in, figures out. Whatever comes from the conductor is shown as text, never as HTML.

import { Bar, deviceParts, ledgerParts, legend, rayParts } from "./bars.js";
import { HAPPENINGS, SpeedChart, Timeline, describe, glyph, laneOf, steps } from "./charts.js";
import { bytes, el, milliseconds, percent, rate, seconds, setAttribute, setText, whole } from "./format.js";
import { DataTable } from "./tables.js";

const MIB = 2 ** 20, LISTED = 200, KEPT = 3000, SILENT_AFTER_MS = 12000, AGAIN_AFTER_MS = 2000;
const $ = (id) => document.getElementById(id);
const state = { status: null, problem: "", entries: [], samples: [], tokensPerS: 0, seenAt: 0, range: 120, held: false };

// --- what is on the page ------------------------------------------------------------------------------------------------

const told = (bar, text) => {
  for (const other of Object.values(bars)) if (other !== bar) other.told = null;
  setText($("bar-detail"), text);
};
const bars = {
  ledger: new Bar($("bars"), { name: "Ledger", detail: told }),
  device: new Bar($("bars"), { name: "Device's own reading", detail: told }),
  ray: new Bar($("bars"), { name: "Ray's books", detail: told }),
};
legend($("legend"));

const swatch = (kind, text) => [el("span", { class: `swatch kind-${kind}`, "aria-hidden": "true" }), ` ${text}`];
const ledger = new DataTable($("ledger"), {
  label: "Bookings", none: "Nothing is booked.", key: (r) => r.id,
  columns: [
    { name: "holder", text: (r) => r.holder },
    { name: "kind", text: (r) => r.kind, nodes: (r) => swatch(r.kind, r.kind) },
    { name: "size", text: (r) => bytes(r.bytes), number: true },
    { name: "bytes", text: (r) => whole(r.bytes), number: true },
    { name: "of the device", text: (r) => percent(r.bytes / state.status.device.total_bytes), number: true },
    { name: "id", text: (r) => r.id },
  ],
});

const PLACES = { slot: "in a slot", host: "host memory", disk: "disk", tokens: "tokens only" };
const place = (a) => `${PLACES[a.kv] ?? a.kv}${a.busy ? ", busy" : ""}${a.saved_bytes ? `, ${bytes(a.saved_bytes)}` : ""}`;
const fill = (a) => {
  const meter = el("meter", { min: 0, max: a.window, value: a.tokens, "aria-label": `${a.tokens} of ${a.window} tokens` });
  return [meter, ` ${whole(a.tokens)} / ${whole(a.window)}`];
};
const agents = new DataTable($("agents"), {
  label: "Agents", none: "Nobody is registered.", key: (a) => a.id,
  columns: [
    { name: "agent", text: (a) => a.id },
    { name: "model", text: (a) => a.model },
    { name: "KV", text: place, nodes: (a) => [el("span", { class: `place place-${a.kv}`, "aria-hidden": "true" }), ` ${place(a)}`] },
    { name: "tokens / window", text: (a) => `${whole(a.tokens)} / ${whole(a.window)}`, nodes: fill },
    { name: "class", text: (a) => a.service_class.replace("_", " ") + (a.priority ? `, priority ${a.priority}` : "") },
    { name: "turns", text: (a) => whole(a.turns), number: true },
    { name: "idle", text: (a) => (a.idle_s ? seconds(a.idle_s) : "–"), number: true },
  ],
});

const waiting = new DataTable($("waiting"), {
  label: "Waiting", none: "Nobody waits.", key: (w) => `${w.what} ${w.agent_id} ${w.position}`,
  columns: [
    { name: "place", text: (w) => String(w.position + 1), number: true },
    { name: "what", text: (w) => (w.what === "register" ? "admission" : w.what) },
    { name: "agent", text: (w) => w.agent_id },
    { name: "model", text: (w) => w.model },
    { name: "why", text: (w) => w.reason },
    { name: "asks for", text: (w) => bytes(w.requested_bytes), number: true },
    { name: "since", text: (w) => seconds(w.waited_s), number: true },
    { name: "gives up in", text: (w) => (w.expires_in_s == null ? "–" : seconds(w.expires_in_s)), number: true },
  ],
});

// A model may have figures that this page has not heard of: sizes among them are shown by their names.
const NAMED = new Set(["bytes", "estimated_bytes", "estimate_error", "agents"]);
const READ = { _bytes: bytes, _s: seconds, _ms: milliseconds, _share: percent };
const more = (m) => Object.entries({ ...m, ...m.weights })
  .filter(([name, value]) => !NAMED.has(name) && Number.isFinite(value) && value)
  .map(([name, value]) => {
    const unit = Object.keys(READ).find((suffix) => name.endsWith(suffix)) ?? "";
    return `${name.slice(0, name.length - unit.length).replaceAll("_", " ")} ${(READ[unit] ?? whole)(value)}`;
  })
  .join(", ");
const models = new DataTable($("models"), {
  label: "Models", none: "No model is in use.", key: (m) => m.key,
  columns: [
    { name: "model", text: (m) => m.key },
    { name: "residency", text: (m) => m.residency || m.state },
    { name: "agents", text: (m) => whole(m.agents), number: true },
    { name: "on the device", text: (m) => bytes(m.bytes), number: true },
    { name: "estimate off by", text: (m) => (m.estimate_error == null ? "–" : percent(m.estimate_error)), number: true },
    { name: "besides", text: (m) => more(m) || "–" },
    { name: "file", text: (m) => m.path },
  ],
});
const pools = new DataTable($("pools"), {
  label: "Pools", none: "No pool is open.", key: (p) => p.id,
  columns: [
    { name: "model", text: (p) => p.model },
    { name: "of", text: (p) => p.owner ?? "all" },
    { name: "slots", text: (p) => `${p.running} running, ${p.seated} seated of ${p.slots}` },
    { name: "window", text: (p) => whole(p.window), number: true },
    { name: "booked", text: (p) => bytes(p.bytes), number: true },
    { name: "phase", text: (p) => p.phase },
  ],
});

const history = new DataTable($("history"), {
  label: "What happened", none: "Nothing yet.", key: (e) => e.number,
  columns: [
    { name: "what", text: (e) => e.kind, nodes: (e) => [glyph(e.kind)] },
    { name: "ago", text: (e) => seconds(Math.max(0, state.status.uptime_s - e.at_s)), number: true },
    { name: "who", text: (e) => e.agent ?? "–" },
    { name: "model", text: (e) => e.model ?? "–" },
    { name: "bytes", text: (e) => (e.bytes == null ? "–" : bytes(e.bytes)), number: true },
    { name: "took", text: (e) => milliseconds(e.ms ?? NaN), number: true },
    { name: "text", text: (e) => e.text || "–" },
  ],
});
const speeds = new DataTable($("speeds"), {
  label: "Tokens per second", none: "No figures yet.", key: (s) => s.at,
  columns: [
    { name: "ago", text: (s) => seconds(s.ago), number: true },
    { name: "tokens per second", text: (s) => rate(s.speed), number: true },
  ],
});
const timeline = new Timeline($("timeline")), speed = new SpeedChart($("speed"));

// --- what can be chosen ---------------------------------------------------------------------------------------------------

for (const [range, name] of [[30, "30 s"], [120, "2 min"], [600, "10 min"]]) {
  const input = el("input", { type: "radio", name: "range", value: range });
  input.checked = range === state.range;
  input.addEventListener("change", () => { state.range = range; show(); });
  $("range").append(el("label", {}, input, ` ${name}`));
}
const listed = new Set(Object.values(HAPPENINGS).map(([lane]) => lane));
for (const lane of [...listed]) {
  const input = el("input", { type: "checkbox", value: lane });
  input.checked = true;
  input.addEventListener("change", () => { input.checked ? listed.add(lane) : listed.delete(lane); show(); });
  $("filter").append(el("label", {}, input, ` ${lane}`));
}
$("pause").addEventListener("click", () => {
  state.held = !state.held;
  setAttribute($("pause"), "aria-pressed", state.held);
  show();
});
new ResizeObserver(() => show()).observe($("main"));

// --- showing ------------------------------------------------------------------------------------------------------------

let asked = false;
function show() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    connection();
    if (state.status && !state.held) figures(state.status);
  });
}

function connection() {
  const silent = performance.now() - state.seenAt > SILENT_AFTER_MS;
  const lost = !state.seenAt || silent ? "No word from the board: it may have been stopped. Trying again …" : "";
  const problem = lost || (state.problem && `What is shown is old: ${state.problem}. Trying again …`);
  const shown = state.seenAt ? problem : "";
  setText($("banner"), shown);
  $("banner").hidden = !shown;
  const [mode, text] = !state.seenAt ? ["wait", "connecting …"] : problem ? ["lost", "connection lost"] : state.held ? ["held", "held still"] : ["live", "live"];
  setAttribute($("connection"), "data-state", mode);
  setText($("connection"), text);
  document.body.classList.toggle("stale", Boolean(shown));
}

function figures(status) {
  const { device, ledger: books, mirror, host_memory: memory } = status;
  const now = status.uptime_s, wide = Math.max(device.total_bytes, books.allocated_bytes + device.others_bytes);
  setText($("device"), `${device.name} (${device.kind}; ${device.chosen})`);
  const ours = device.total_bytes - device.free_bytes - device.others_bytes;
  numbers({
    "booked of the cap": [`${bytes(books.allocated_bytes)} of ${bytes(books.max_bytes)}`, percent(books.allocated_bytes / books.max_bytes)],
    "tokens per second": [rate(state.tokensPerS), `${whole(status.computed_tokens)} since the start`],
    agents: [whole(status.agents.length), `${status.agents.filter((a) => a.busy).length} at work`],
    waiting: [whole(status.waiting.length), status.waiting[0]?.reason ?? "nobody"],
    "device reading": [bytes(ours), drift(device) || `of ${bytes(device.total_bytes)} used by the conductor`],
    "Ray's mirror": [mirror.state, `${bytes(mirror.used_mib * MIB)}, ledger ${bytes(mirror.ledger_mib * MIB)}${mirror.note ? `; ${mirror.note}` : ""}`],
    "saved KV": [bytes(memory.used_bytes + (memory.disk_used_bytes ?? 0)), `host memory ${bytes(memory.used_bytes)} of ${bytes(memory.budget_bytes)}`],
  });
  bars.ledger.show(ledgerParts(status), wide, {
    note: `${bytes(books.allocated_bytes)} booked of ${bytes(books.max_bytes)} that may be`, cap: books.max_bytes,
  });
  bars.device.show(deviceParts(status), wide, { note: `${bytes(ours)} used by the conductor; ledger ${bytes(books.allocated_bytes)}${drift(device) && `; ${drift(device)}`}` });
  bars.ray.show(rayParts(status), wide, { note: `${mirror.state}: ${bytes(mirror.used_mib * MIB)} of ${bytes(mirror.total_mib * MIB)} in use` });
  ledger.show([...books.reservations].sort((a, b) => b.bytes - a.bytes));
  agents.show(status.agents);
  waiting.show(status.waiting);
  models.show(status.models);
  pools.show(status.pools);
  speed.show(state.samples, now, state.range);
  speeds.show(steps(state.samples, now, state.range));
  timeline.show(state.entries, now, state.range);
  history.show(state.entries.filter((entry) => listed.has(laneOf(entry.kind))).slice(-LISTED).reverse());
  setText($("footer"), `vram-conductor ${status.version}, llama.cpp ${status.llama_cpp}, ${status.threads} threads, up ${seconds(now)}. ${status.estimates}`);
}

const drift = (device) => (device.drift_bytes ? `drift: strangers hold ${bytes(device.drift_bytes)} of what is booked` : "");

const shownNumbers = new Map();
function numbers(figures) {
  for (const [name, [value, note]] of Object.entries(figures)) {
    let cells = shownNumbers.get(name);
    if (!cells) {
      cells = [el("dd", { class: "value", "data-figure": name }), el("dd", { class: "quiet" })];
      shownNumbers.set(name, cells);
      $("figures").append(el("div", {}, el("dt", {}, name), ...cells));
    }
    setText(cells[0], value);
    setText(cells[1], note);
  }
}

// --- listening ----------------------------------------------------------------------------------------------------------

const SPOKEN = new Set(["refused", "drift", "failed"]);

function hear({ anew, problem, status, tokens_per_s, entries, samples }) {
  if (anew) state.entries = [], state.samples = [];
  if (!anew) speak(entries);
  state.entries = [...state.entries, ...entries].slice(-KEPT);
  state.samples = [...state.samples, ...samples].slice(-KEPT);
  Object.assign(state, { problem, status: status ?? state.status, tokensPerS: tokens_per_s, seenAt: performance.now() });
  show();
}

function speak(entries) {
  const words = entries.filter((entry) => SPOKEN.has(entry.kind)).map((entry) => describe(entry));
  if (words.length) setText($("announcer"), words.slice(-3).join(". "));
}

function listen() {
  const events = new EventSource("events");
  events.onmessage = (event) => hear(JSON.parse(event.data));
  events.onerror = () => {
    state.seenAt = state.seenAt && -SILENT_AFTER_MS;  // at once: silence is what the watch below is for
    show();
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, AGAIN_AFTER_MS);
  };
}
setInterval(connection, 1000);
listen();
