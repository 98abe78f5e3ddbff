"""Plots for notebooks, with matplotlib, which is imported when the first is drawn (extra `notebook`).

Lines are told apart by their marks and dashes, so that a print without colour can be read. The streaming experiment draws its own
(`pipelines.plots`); `picture` shows those too.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conductor.errors import InvalidRequest
from conductor.happenings import Happening, HistoryEntry
from conductor.notebook.costs import SwapPoint, fitted
from conductor.types import LedgerEntry, Status
from conductor.units import MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Pictures are kept in the notebooks' files, so they are small.
_DPI, _COLOURS = 80, 48
_MARKED = (Happening.ADMITTED, Happening.REFUSED, Happening.LEFT)


@dataclass(frozen=True, slots=True, repr=False)
class Picture:
    """A figure, shown as PNG, and in words where there are no pictures."""

    figure: Figure
    text: str

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"image/png": _png(self.figure), "text/plain": self.text}, {"image/png": {"alt": self.text}}

    def __repr__(self) -> str:
        return self.text


def picture(figure: Figure, text: str) -> Picture:
    """Any figure, for instance of `pipelines.plots`. `text` says what is to be seen on it."""
    return Picture(figure, text)


def ledger_over_time(
    log: Sequence[LedgerEntry], *, mirror: Iterable[Status] = (), history: Iterable[HistoryEntry] = ()
) -> Picture:
    """Booked bytes and the cap over time, from `ledger_log`.

    `mirror`: statuses taken meanwhile, for Ray's figures. `history`: marks who was admitted, was refused or left.
    Raises InvalidRequest if matplotlib is not installed, or there is nothing to draw.
    """
    if not log:
        raise InvalidRequest("log", "is empty: nothing was booked yet")
    seen = list(mirror)
    figure = _figure(height=3.6)
    axes = figure.subplots()
    end_s = max([log[-1].at_s, *(status.uptime_s for status in seen)])
    times, booked = [entry.at_s for entry in log], [entry.allocated_bytes / MIB for entry in log]
    caps = [entry.max_bytes / MIB for entry in log]
    axes.step([*times, end_s], [*caps, caps[-1]], "k--", where="post", linewidth=1, label="cap")
    axes.step([*times, end_s], [*booked, booked[-1]], "-", where="post", color="#3182bd", label="ledger: booked")
    if seen:
        told = [status.mirror.used_mib for status in seen]
        axes.plot([s.uptime_s for s in seen], told, "x", color="#d94801", markersize=5, label="Ray: in use")
    for at_s, said in _marks(history, apart_s=0.02 * end_s):
        axes.axvline(at_s, color="0.7", linewidth=0.8, zorder=0)
        foot = axes.get_xaxis_transform()
        axes.text(at_s, 0.02, said, transform=foot, rotation=90, fontsize=7, va="bottom", ha="right")
    axes.set(xlabel="seconds since the conductor's start", ylabel="MiB", ylim=(0, 1.05 * max(*caps, *booked)))
    axes.grid(visible=True, axis="y", color="0.9")
    figure.legend(loc="outside upper left", ncols=3)
    return Picture(
        figure,
        f"at most {max(booked):.1f} of {max(caps):.1f} MiB booked, {booked[-1]:.1f} in the end; {len(seen)} figures of Ray's",
    )


def _marks(history: Iterable[HistoryEntry], *, apart_s: float) -> list[tuple[float, str]]:
    """When, and what came or went: what is too close for words of its own is said with what was before it."""
    marks: list[tuple[float, str]] = []
    for entry in history:
        if entry.kind in _MARKED:
            said = f"{entry.agent or ''} {entry.kind.value}".strip()
            if marks and entry.at_s - marks[-1][0] < apart_s:
                marks[-1] = marks[-1][0], f"{marks[-1][1]}, {said}"
            else:
                marks.append((entry.at_s, said))
    return marks


def swap_costs(points: Sequence[SwapPoint]) -> Picture:
    """Milliseconds over tokens, with the least-squares line and its figures. Raises InvalidRequest."""
    line = fitted(points)
    figure = _figure(height=4)
    axes = figure.subplots()
    ends = [0, max(point.tokens for point in points)]
    axes.plot([p.tokens for p in points], [p.ms for p in points], "o", color="#3182bd", markerfacecolor="none", label="measured")
    axes.plot(ends, [line.at_none_ms + line.ms_per_token * tokens for tokens in ends], "k-", linewidth=1, label=str(line))
    axes.set(xlabel="tokens whose KV was moved", ylabel="ms", xlim=(0, 1.05 * ends[1]))
    axes.set_ylim(bottom=min(0.0, line.at_none_ms))
    axes.grid(visible=True, color="0.9")
    axes.legend(loc="upper left")
    return Picture(figure, str(line))


def _figure(*, height: float) -> Figure:
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("plot", "matplotlib is not installed: pip install 'vram-conductor[notebook]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(9, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    from PIL import Image  # matplotlib's own; with a palette it takes a third of the bytes

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    Image.open(drawn).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()
