"""`conductor top`: a running conductor in the terminal, as it works. `board` is the same as a page.

`frame` makes a picture for a given width and height: columns go when it is narrow, rows when it is low, and what was left out is
said. Nothing in it is told by colour alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from conductor.happenings import HistoryEntry
from conductor.types import AgentStatus, ModelStatus, PoolStatus, Status, WaitingStatus
from conductor.units import MIB, format_bytes
from pipelines import tables
from pipelines.console import errors, out, printable
from pipelines.watch import Sample, View, Watch

R = TypeVar("R")

_LABEL_CELLS, _FIGURES_CELLS, _LEAST_BAR = 7, 32, 10
_STEPS = " ▁▂▃▄▅▆▇█"
#: of the history where there is no height to fill
_ONCE_ENTRIES = 12
_BAD, _MOVE = ("refused", "failed", "dropped", "drift"), ("swapped_out", "parked", "paused")


@dataclass(frozen=True, slots=True)
class Column(Generic[R]):
    name: str
    cell: Callable[[R], str]
    from_width: int = 0  #: of the terminal: in a narrower one it is not there
    right: bool = False
    fills: bool = False  #: takes the width that the others leave; of other texts no column has more than its share


AGENTS: tuple[Column[AgentStatus], ...] = (
    Column("agent", lambda a: a.id),
    Column("model", lambda a: a.model, 50),
    Column("KV", lambda a: f"{a.kv.value}, busy" if a.busy else a.kv.value),
    Column("saved", lambda a: format_bytes(a.saved_bytes) if a.saved_bytes else "–", 90, right=True),
    Column("tokens", lambda a: f"{a.tokens:,}", right=True),
    Column("window", lambda a: f"{a.window:,}", 60, right=True),
    Column("class", lambda a: a.service_class.value, 80),
    Column("turns", lambda a: str(a.turns), 70, right=True),
    Column("idle", lambda a: f"{a.idle_s:.0f} s" if a.idle_s else "–", 100, right=True),
)
WAITING: tuple[Column[WaitingStatus], ...] = (
    Column("waiting", lambda w: w.agent_id),
    Column("for", lambda w: "admission" if w.what == "register" else w.what),
    Column("asks for", lambda w: format_bytes(w.requested_bytes), 90, right=True),
    Column("since", lambda w: f"{w.waited_s:.1f} s", 60, right=True),
    Column("why", lambda w: w.reason, fills=True),
)
MODELS: tuple[Column[ModelStatus], ...] = (
    Column("model", lambda m: m.key),
    Column("residency", lambda m: getattr(m, "residency", "") or m.state.value),
    Column("agents", lambda m: str(m.agents), 60, right=True),
    Column("on the device", lambda m: format_bytes(m.bytes), right=True),
)
POOLS: tuple[Column[PoolStatus], ...] = (
    Column("pool of", lambda p: f"{p.model}, {p.owner}" if p.owner else p.model),
    Column("running", lambda p: f"{p.running} of {p.slots} slots"),
    Column("seated", lambda p: str(p.seated), 70, right=True),
    Column("window", lambda p: f"{p.window:,}", 60, right=True),
    Column("booked", lambda p: format_bytes(p.bytes), right=True),
    Column("phase", lambda p: p.phase, 80),
)


def _history(now_s: float) -> tuple[Column[HistoryEntry], ...]:
    return (
        Column("ago", lambda e: f"{max(0.0, now_s - e.at_s):.0f} s", right=True),
        Column("what", lambda e: e.kind.value.replace("_", " ")),
        Column("who", lambda e: e.agent or "–"),
        Column("model", lambda e: e.model or "–", 100),
        Column("bytes", lambda e: "–" if e.bytes is None else format_bytes(e.bytes), 60, right=True),
        Column("took", lambda e: "–" if e.ms is None else f"{e.ms:.1f} ms", 80, right=True),
        Column("why", lambda e: e.text, 70, fills=True),
    )


@dataclass(slots=True)
class Section(Generic[R]):
    columns: tuple[Column[R], ...]
    rows: Sequence[R]
    style: Callable[[R], str] = lambda _: ""
    lines: int = 0  #: that it gets, its heading and what it says of rows left out included

    @property
    def wanted(self) -> int:
        return len(self.rows) + 1

    def table(self, width: int) -> RenderableType:
        shown = self.rows if self.lines >= self.wanted else self.rows[: max(0, self.lines - 2)]
        columns = [column for column in self.columns if column.from_width <= width]
        fills = any(column.fills for column in columns)
        table = Table(box=None, pad_edge=False, header_style="dim", width=width if fills else None)
        for column in columns:
            table.add_column(
                column.name, justify="right" if column.right else "left", no_wrap=True, overflow="ellipsis",
                ratio=1 if column.fills else None, max_width=None if column.fills else max(12, width // 4),
            )  # fmt: skip
        for row in shown:
            table.add_row(*(Text(_one_line(column.cell(row))) for column in columns), style=self.style(row))
        left_out = len(self.rows) - len(shown)
        return Group(table, Text(f"… {left_out} more", style="dim")) if left_out else table


def frame(view: View, width: int, height: int | None) -> RenderableType:
    """`height`: lines that there are; None: as many as it takes."""
    status = view.status
    banner = Text(
        f" {view.problem}; what is shown is old, trying again … ", style="reverse red", overflow="ellipsis", no_wrap=True
    )
    if status is None:
        return banner
    head = [*([banner] if view.problem else []), *_headlines(status), *_bars(status, width), _speed(view, width)]
    sections: list[Section[object]] = []
    rest = None if height is None else height - len(head)
    newest = view.entries[::-1]
    for columns, rows in ((AGENTS, status.agents), (WAITING, status.waiting), (MODELS, status.models), (POOLS, status.pools)):
        if rows:
            sections.append(Section(columns, rows))  # type: ignore[arg-type]
    sections.append(Section(_history(status.uptime_s), newest if height else newest[:_ONCE_ENTRIES], _tone))  # type: ignore[arg-type]
    allot(sections, rest)
    return Group(*head, *(section.table(width) for section in sections if section.lines))


def allot(sections: Sequence[Section[R]], lines: int | None) -> None:
    """Lines for each: what it wants or, where that is too many, the largest give way, and the last go where nothing helps."""
    for section in sections:
        section.lines = section.wanted
    if lines is None:
        return
    while sum(section.lines for section in sections) > lines:
        largest = max(sections, key=lambda section: section.lines)
        if largest.lines > 3:  # a heading, a row, and how many were left out
            largest.lines -= 1
            continue
        last = next((section for section in reversed(sections) if section.lines), None)
        if last is None:
            return
        last.lines = 0


def _tone(entry: HistoryEntry) -> str:
    return "red" if entry.kind.value in _BAD else "yellow" if entry.kind.value in _MOVE else ""


def _one_line(text: str) -> str:
    """Agents choose their names: they must not steer the terminal."""
    return " ".join(printable(text).split())


def _headlines(status: Status) -> list[Text]:
    device, busy = status.device, sum(agent.busy for agent in status.agents)
    drift = f"; drift: {format_bytes(device.drift_bytes)}" if device.drift_bytes else ""
    about = Text(_one_line(f"{device.name} ({device.kind.value}), up {status.uptime_s:.0f} s{drift}"), style="bold")
    counts = f"{len(status.agents)} agents, {busy} busy; {len(status.waiting)} waiting; saved KV "
    memory = status.host_memory
    counts += f"{format_bytes(memory.used_bytes)} of {format_bytes(memory.budget_bytes)}"
    return [_short(about), _short(Text(counts))]


def _bars(status: Status, width: int) -> list[Text]:
    """The ledger, the device's own reading and Ray's books, to one scale: the cap."""
    cells = max(_LEAST_BAR, width - _LABEL_CELLS - 2 - _FIGURES_CELLS)
    ledger, device, mirror = status.ledger, status.device, status.mirror
    whole = max(ledger.max_bytes, ledger.allocated_bytes, 1)
    ours = max(0, device.total_bytes - device.free_bytes - device.others_bytes)
    used = int(mirror.used_mib * MIB)
    return [
        _short(Text("ledger ") + tables.bar(ledger, cells)),
        _short(_plain_bar("device", ours, whole, cells, f"{format_bytes(ours)} used of {format_bytes(device.total_bytes)}")),
        _short(_plain_bar("Ray", used, whole, cells, f"{format_bytes(used)} {mirror.state.value}")),
    ]


def _plain_bar(label: str, used: int, whole: int, cells: int, figures: str) -> Text:
    filled = min(cells, max(round(used * cells / whole), 1 if used else 0))
    return Text(f"{label:<{_LABEL_CELLS}}[{'#' * filled}{'·' * (cells - filled)}] {figures}")


def _speed(view: View, width: int) -> Text:
    figure = f" {view.tokens_per_s:,.0f} tok/s"
    return _short(Text(f"{'speed':<{_LABEL_CELLS}}") + Text(spark(view.samples, max(_LEAST_BAR, width - 26))) + Text(figure))


def spark(samples: Sequence[Sample], cells: int) -> str:
    """The last samples as a line of blocks, the fastest of them as high as they go."""
    speeds = [sample.tokens_per_s for sample in samples[-cells:]]
    peak = max((*speeds, 1.0))
    line = "".join(_STEPS[round(speed / peak * (len(_STEPS) - 1))] for speed in speeds)
    return line.rjust(cells)


def _short(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


class Screen:
    """The latest view, made anew for whatever size the terminal has when it is drawn."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield frame(self._watch.view, options.max_width, options.height or console.size.height)


def command(
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end; so does a pipe.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two looks at the conductor.")] = 0.5,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration that names the conductor.")] = None,
) -> None:
    """The card, agents, who waits and what happens, live in the terminal. Ctrl-C ends it.

    Example: conductor top --interval 1
    """
    with errors(), Watch(config) as watch:
        watch.see()
        if once or not out.is_terminal:
            out.print(frame(watch.view, out.width, None))
        else:
            _live(watch, interval)


def _live(watch: Watch, interval_s: float) -> None:
    with _resized() as resized, Live(Screen(watch), console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.refresh()
            if resized.wait(interval_s):
                resized.clear()  # the same picture in the new size, at once
            else:
                watch.look()


@contextmanager
def _resized() -> Iterator[threading.Event]:
    """Set whenever the terminal's size has changed."""
    event = threading.Event()
    before = signal.signal(signal.SIGWINCH, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGWINCH, before)
