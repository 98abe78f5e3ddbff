// Tables that stay the same rows while their figures change. On a narrow screen each row is a card (board.css).

import { el, setText } from "./format.js";

export class DataTable {
  /** `columns`: {name, text(row) or nodes(row), number}; `key(row)` tells rows apart; `none` is said where there is no row. */
  constructor(place, { label, columns, key, none }) {
    this.columns = columns;
    this.key = key;
    this.rows = new Map();
    this.body = el("tbody");
    const head = el("tr", {}, ...columns.map((column) => el("th", { scope: "col", class: column.number ? "number" : null }, column.name)));
    this.table = el("table", { "aria-label": label }, el("thead", {}, head), this.body);
    this.none = el("p", { class: "none quiet" }, none);
    place.replaceChildren(this.table, this.none);
  }

  show(items) {
    const gone = new Set(this.rows.keys());
    items.forEach((item, index) => {
      const key = String(this.key(item));
      gone.delete(key);
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = this._row()));
      this._fill(row, item);
      if (this.body.children[index] !== row) this.body.insertBefore(row, this.body.children[index] ?? null);
    });
    for (const key of gone) {
      this.rows.get(key).remove();
      this.rows.delete(key);
    }
    this.table.hidden = items.length === 0;
    this.none.hidden = items.length > 0;
  }

  _row() {
    const cells = this.columns.map((column, index) =>
      el(index ? "td" : "th", { scope: index ? null : "row", class: column.number ? "number" : null, "data-label": column.name }));
    return el("tr", {}, ...cells);
  }

  _fill(row, item) {
    this.columns.forEach((column, index) => {
      const cell = row.children[index];
      if (!column.nodes) return setText(cell, column.text(item));
      const said = column.text(item);
      if (cell.dataset.said === said) return;
      cell.dataset.said = said;
      cell.replaceChildren(...column.nodes(item));
    });
  }
}
