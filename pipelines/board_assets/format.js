// Figures as people read them, and elements whose text is always text: nothing here makes HTML of data.

export function bytes(count) {
  if (!Number.isFinite(count)) return "–";
  let size = Math.abs(count), unit = "B";
  for (unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (size < 1023.5 || unit === "TiB") break;
    size /= 1024;
  }
  const digits = unit === "B" || size >= 100 ? size.toFixed(0) : size.toFixed(1);
  return `${count < 0 ? "−" : ""}${digits} ${unit}`;
}

export const whole = (count) => (Number.isFinite(count) ? Math.round(count).toLocaleString("en") : "–");
export const percent = (share) => (Number.isFinite(share) ? `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %` : "–");

export function seconds(s) {
  if (!Number.isFinite(s)) return "–";
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 120) return `${s.toFixed(0)} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

export const milliseconds = (ms) =>
  Number.isFinite(ms) ? (ms < 10 ? `${ms.toFixed(1)} ms` : ms < 10000 ? `${ms.toFixed(0)} ms` : seconds(ms / 1000)) : "–";

export const rate = (perSecond) => (perSecond > 0 && perSecond < 10 ? perSecond.toFixed(1) : whole(perSecond));

/** `el("p", {class: "x", title: "y"}, "text", node)`; what is null is left out. */
export function el(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children.filter((child) => child != null));
  return node;
}

/** Only what differs: a screen reader says it again, and a selection is lost, otherwise. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (value == null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}
