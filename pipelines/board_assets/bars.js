// The card as bars on one scale: what is booked, what the device itself says, and what Ray has on its books.

import { bytes, el, percent, setAttribute, setText } from "./format.js";

/** What a stretch of a bar may be; the pattern is the class's (board.css), the letter is for where there is no room for a name. */
export const KINDS = {
  overhead: { letter: "o", tells: "overhead: the process itself" },
  weights: { letter: "w", tells: "weights of a model" },
  ring: { letter: "r", tells: "ring: slots that a streamed model's layers pass through" },
  context: { letter: "c", tells: "context: a live pool's KV cache and buffers" },
  headroom: { letter: "h", tells: "headroom: promised turns, not in use now" },
  external: { letter: "x", tells: "external: booked by other tasks" },
  used: { letter: "u", tells: "used by the conductor, as the device reads" },
  free: { letter: "", tells: "free" },
  reserve: { letter: "", tells: "never booked: above the cap" },
  others: { letter: "s", tells: "held by the driver and by strangers" },
};
const ORDER = ["overhead", "weights", "ring", "context", "headroom", "external"];
const kindOf = (kind) => (KINDS[kind] ? kind : "external");

export function ledgerParts(status) {
  const { ledger, device } = status;
  const booked = [...ledger.reservations]
    .filter((reserved) => reserved.bytes > 0)
    .sort((a, b) => ORDER.indexOf(kindOf(a.kind)) - ORDER.indexOf(kindOf(b.kind)))
    .map((reserved) => ({ key: reserved.id, kind: kindOf(reserved.kind), name: reserved.holder, what: reserved.kind, bytes: reserved.bytes }));
  const others = Math.min(device.others_bytes, device.total_bytes);
  return [
    ...booked,
    { key: "free", kind: "free", name: "free", what: "to be booked", bytes: Math.max(0, ledger.max_bytes - ledger.allocated_bytes) },
    { key: "reserve", kind: "reserve", name: "never booked", what: "above the cap", bytes: Math.max(0, device.total_bytes - others - ledger.max_bytes) },
    { key: "others", kind: "others", name: "others", what: "driver and strangers", bytes: others },
  ].filter((part) => part.bytes > 0);
}

export function deviceParts({ device }) {
  const used = device.total_bytes - device.free_bytes - device.others_bytes;
  return [
    { key: "used", kind: "used", name: "used by the conductor", what: "device reading", bytes: Math.max(0, used) },
    { key: "free", kind: "free", name: "free", what: "device reading", bytes: device.free_bytes },
    { key: "others", kind: "others", name: "others", what: "driver and strangers", bytes: device.others_bytes },
  ].filter((part) => part.bytes > 0);
}

export function rayParts({ mirror, device }) {
  const used = mirror.used_mib * 2 ** 20, total = mirror.total_mib * 2 ** 20;
  return [
    { key: "used", kind: "used", name: "used", what: mirror.resource || "no resource", bytes: used },
    { key: "free", kind: "free", name: "free", what: mirror.resource || "no resource", bytes: total - used },
    { key: "rest", kind: "reserve", name: "not in its books", what: "never booked", bytes: device.total_bytes - total },
  ].filter((part) => part.bytes > 0);
}

export class Bar {
  /** `detail`: told what the stretch is that somebody points at. */
  constructor(place, { name, detail }) {
    this.detail = detail;
    this.note = el("span", { class: "quiet" });
    this.strip = el("div", { class: "strip", role: "toolbar", "aria-label": name, "aria-orientation": "horizontal" });
    this.cap = el("span", { class: "cap", "aria-hidden": "true" }, "cap");
    this.cap.hidden = true;
    const frame = el("div", { class: "frame" }, this.strip, this.cap);
    place.append(el("div", { class: "bar" }, el("p", { class: "bar-name" }, el("strong", {}, name), " ", this.note), frame));
    this.parts = new Map();
    this.strip.addEventListener("keydown", (event) => this._walk(event));
    this.strip.addEventListener("focusin", (event) => this._tell(event.target));
    this.strip.addEventListener("pointerover", (event) => this._tell(event.target));
    this.strip.addEventListener("click", (event) => this._tell(event.target));
  }

  /** `whole`: bytes that the full width stands for. Widths are in true proportion, however small. */
  show(parts, whole, { note = "", cap = null } = {}) {
    setText(this.note, note);
    this.cap.hidden = cap == null;
    if (cap != null) this.cap.style.insetInlineStart = `${(cap / whole) * 100}%`;
    const gone = new Set(this.parts.keys());
    parts.forEach((part, index) => {
      gone.delete(part.key);
      let node = this.parts.get(part.key);
      if (!node) this.parts.set(part.key, (node = el("button", { type: "button", tabindex: "-1" }, el("span", { "aria-hidden": "true" }))));
      this._dress(node, part, whole);
      if (this.strip.children[index] !== node) this.strip.insertBefore(node, this.strip.children[index] ?? null);
    });
    for (const key of gone) {
      this.parts.get(key).remove();
      this.parts.delete(key);
    }
    if (this.told?.isConnected) this._tell(this.told);
    if (!this.strip.querySelector('[tabindex="0"]')) this.strip.firstElementChild?.setAttribute("tabindex", "0");
  }

  _dress(node, part, whole) {
    setAttribute(node, "class", `part kind-${part.kind}`);
    setAttribute(node, "data-key", part.key);
    setAttribute(node, "data-bytes", part.bytes);
    setAttribute(node, "aria-label", `${part.name}, ${part.what}: ${bytes(part.bytes)}, ${percent(part.bytes / whole)} of the device`);
    const share = `${(part.bytes / whole) * 100}%`;
    if (node.style.width !== share) node.style.width = share;
    const room = (part.bytes / whole) * this.strip.clientWidth;
    setText(node.firstElementChild, room > 56 ? `${part.name} ${bytes(part.bytes)}` : room > 14 ? KINDS[part.kind].letter : "");
  }

  _walk(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const parts = [...this.strip.children];
    const at = parts.indexOf(document.activeElement);
    const to = event.key === "Home" ? 0 : event.key === "End" ? parts.length - 1 : step ? at + step : -1;
    if (!(to >= 0 && to < parts.length)) return;
    event.preventDefault();
    for (const part of parts) part.setAttribute("tabindex", part === parts[to] ? "0" : "-1");
    parts[to].focus();
  }

  _tell(node) {
    const part = node.closest?.(".part");
    if (!part) return;
    this.told = part;
    this.detail(this, part.getAttribute("aria-label"));
  }
}

export function legend(place) {
  const items = Object.entries(KINDS).map(([kind, { letter, tells }]) =>
    el("li", {}, el("span", { class: `swatch kind-${kind}`, "aria-hidden": "true" }, letter), ` ${tells}`));
  place.replaceChildren(...items);
}
