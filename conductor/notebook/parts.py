"""What views are made of: lines, tables and bars, each as HTML and as plain text.

Everything is escaped. Colours are set where text stands on them and inherited elsewhere, so dark and light both read; letters
and patterns say what colours say. What they show is decided in `views`.
"""

from __future__ import annotations

import html
import itertools
from dataclasses import dataclass

#: A letter, a background and a pattern over it.
Look = tuple[str, str, str]

_BAR_CELLS = 48
_LINES = "\n\t"
#: Of a bar's width, what its label needs; less has room for the letter, still less for nothing: the table below has it.
_LEAST_LABELLED, _LEAST_LETTERED = 0.14, 0.025

_GRID = "border-collapse:collapse;margin:.4em 0 .8em;color:inherit;font:inherit"
_CELL = "text-align:left;padding:.1em .8em .1em 0;border-bottom:1px solid rgba(128,128,128,.4)"
_STRIP = "display:flex;height:1.8em;line-height:1.8em;max-width:60em;border:1px solid currentColor"
_STRETCH = "overflow:hidden;white-space:nowrap;text-align:center;color:#111;box-shadow:inset -1px 0 #111"


def printable(words: str, *, keep: str = "") -> str:
    """Names may hold anything: what would move a cursor or break a line becomes a mark."""
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in words)


def escaped(words: str, *, keep: str = "") -> str:
    return html.escape(printable(words, keep=keep))


def stripes(angle: int) -> str:
    return f"repeating-linear-gradient({angle}deg,transparent 0 5px,rgba(0,0,0,.14) 5px 7px)"


@dataclass(frozen=True, slots=True)
class Line:
    words: str
    strong: bool = False

    def html(self) -> str:
        words = escaped(self.words)
        return f"<div><strong>{words}</strong></div>" if self.strong else f"<div>{words}</div>"

    def text(self) -> str:
        return printable(self.words)


@dataclass(frozen=True, slots=True)
class Verbatim:
    words: str

    def html(self) -> str:
        return f'<pre style="white-space:pre-wrap">{escaped(self.words, keep=_LINES)}</pre>'

    def text(self) -> str:
        return printable(self.words, keep=_LINES)


@dataclass(frozen=True, slots=True)
class Table:
    """Nothing where it has no rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def html(self) -> str:
        if not self.rows:
            return ""
        caption = f'<caption style="text-align:left">{escaped(self.title)}</caption>' if self.title else ""
        head = "".join(f'<th style="{_CELL}">{escaped(name)}</th>' for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="{_CELL}">{escaped(cell)}</td>' for cell in row) + "</tr>" for row in self.rows
        )
        return f'<table style="{_GRID}">{caption}{f"<tr>{head}</tr>" if head else ""}{body}</table>'

    def text(self) -> str:
        lines = [[printable(cell) for cell in line] for line in (self.columns, *self.rows) if line] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join(f"  {line}" for line in padded)


@dataclass(frozen=True, slots=True)
class Stretch:
    look: Look
    name: str
    amount: float
    said: str

    def html(self, whole: float) -> str:
        letter, colour, pattern = self.look
        share = self.amount / whole
        name = f"{letter} {self.name}" if share >= _LEAST_LABELLED else letter if share >= _LEAST_LETTERED else ""
        style = f"flex:0 0 {100 * share:.4f}%;background-color:{colour};background-image:{pattern};{_STRETCH}"
        return f'<div style="{style}" title="{escaped(f"{self.name}: {self.said}")}">{escaped(name)}</div>'


@dataclass(frozen=True, slots=True)
class Bar:
    """In true proportion: a stretch is as long as its share of `whole`; what is left is free."""

    title: str
    stretches: tuple[Stretch, ...]
    whole: float

    def html(self) -> str:
        stretches = [stretch for stretch in self.stretches if stretch.amount > 0]
        told = escaped("; ".join([self.title, *(f"{stretch.name}: {stretch.said}" for stretch in stretches)]))
        strip = "".join(stretch.html(self.whole) for stretch in stretches)
        return f'<div>{escaped(self.title)}</div><div role="img" aria-label="{told}" style="{_STRIP}">{strip}</div>'

    def text(self) -> str:
        """What is there at all has a letter; if that makes too many, the longest yields."""
        stretches = [stretch for stretch in self.stretches if stretch.amount > 0]
        ends = [round(_BAR_CELLS * end / self.whole) for end in itertools.accumulate(stretch.amount for stretch in stretches)]
        cells = [max(1, end - begin) for begin, end in itertools.pairwise([0, *ends])]
        while sum(cells) > max(_BAR_CELLS, len(cells)):
            cells[cells.index(max(cells))] -= 1
        letters = "".join(stretch.look[0] * count for stretch, count in zip(stretches, cells, strict=True))
        return f"[{letters.ljust(_BAR_CELLS, '·')}] {self.title}"


Part = Line | Verbatim | Table | Bar
