"""`conductor timeline`: the log as a trace that Perfetto and chrome://tracing open: a row for each agent, model and pool.

Ray's own timeline has a row for each process, in which the calls of an async actor lie upon each other, and takes no spans from
within one. This is what happened inside the conductor; `--ray` puts both into one file, on one clock.

Covers what becomes a span, what a mark, and in which row. Does not cover reading the log (`log_lines`).
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from conductor.errors import InvalidRequest
from conductor.happenings import Happening
from conductor.log_file import BEGINS, MESSAGE
from conductor.types import JSON
from pipelines.console import errors, out
from pipelines.log_lines import Log, LogLine, log_path
from pipelines.session import joined, settings

Event: TypeAlias = "dict[str, JSON]"

_GROUPS = ("agents", "models", "pools", "conductor")
_H = Happening
#: what takes the time that its line tells, until the line
_SPANS = {
    _H.ADMITTED: "admission", _H.RESERVED: "reservation", _H.TURN_ENDED: "turn", _H.SWAPPED_OUT: "KV leaves",
    _H.SWAPPED_IN: "KV comes back", _H.LOADED: "load", _H.PARKED: "park", _H.UNLOADED: "unload", _H.POOL_OPENED: "open",
    _H.POOL_CLOSED: "close",
}  # fmt: skip
_OF_MODELS, _OF_POOLS = (_H.LOADED, _H.PARKED, _H.UNLOADED), (_H.POOL_OPENED, _H.POOL_CLOSED)
_BEGIN, _END = (_H.LOADED, _H.POOL_OPENED), (_H.PARKED, _H.UNLOADED, _H.POOL_CLOSED)


class Trace:
    """Takes the lines in their order; `events` is what they come to, all that is live living on until the last of them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._rows: dict[tuple[str, str], int] = {}
        #: what is on the device: since when, and the line that told of it
        self._live: dict[tuple[str, str], tuple[float, LogLine]] = {}
        self._last_us = 0.0

    def add(self, line: LogLine) -> None:
        self._last_us = end_us = _microseconds(line.time)
        if line.kind == MESSAGE:
            if line.level in ("warning", "error"):
                self._mark("conductor", line.logger or MESSAGE, line, end_us)
            return
        kind = Happening(line.kind)
        begin_us = end_us - (line.ms or 0.0) * 1000
        if kind in (*_OF_MODELS, *_OF_POOLS):
            self._lives(kind, line, begin_us, end_us)
        elif kind is _H.TURN_BEGAN and line.ms is not None:
            self._waited(line, begin_us, end_us)
        elif kind in _SPANS and line.ms is not None:
            self._span("agents", line.agent or "", _SPANS[kind], line, begin_us, end_us)
        elif kind is not _H.ASKED:
            group, row = ("agents", line.agent) if line.agent else ("conductor", "conductor")
            self._mark(group, row, line, end_us)

    def events(self) -> list[Event]:
        still = [self._event(key, "live", since, self._last_us, line) for key, (since, line) in self._live.items()]
        return [*self._names(), *self._events, *still]

    def _lives(self, kind: Happening, line: LogLine, begin_us: float, end_us: float) -> None:
        """Its coming, its being there, its going: one after the other in a row."""
        group = "models" if kind in _OF_MODELS else "pools"
        name = f"{line.model} of {line.agent}" if line.agent and group == "pools" else str(line.model)
        rows = ((group, name if n == 1 else f"{name} ({n})") for n in itertools.count(1))
        if kind in _BEGIN:
            key = next(key for key in rows if key not in self._live)
            self._live[key] = (end_us, line)
        else:
            key = next((key for key in itertools.islice(rows, 9) if key in self._live), (group, name))
            since, told = self._live.pop(key, (begin_us, line))
            self._events.append(self._event(key, "live", since, max(since, begin_us), told))
        self._events.append(self._event(key, _SPANS[kind], begin_us, end_us, line))

    def _span(self, group: str, row: str, name: str, line: LogLine, begin_us: float, end_us: float) -> None:
        self._events.append(self._event((group, row), name, begin_us, end_us, line))

    def _event(self, key: tuple[str, str], name: str, begin_us: float, end_us: float, line: LogLine) -> Event:
        span: Event = {"ph": "X", "name": name, "cat": key[0], "ts": begin_us, "dur": max(0.0, end_us - begin_us)}
        return {**span, **self._at(*key), "args": _details(line)}

    def _waited(self, line: LogLine, begin_us: float, end_us: float) -> None:
        """Beside its agent's row: one turn may wait while another runs."""
        common: Event = {"name": "waits", "cat": "wait", "id": line.request, **self._at("agents", line.agent or "")}
        self._events += [{**common, "ph": "b", "ts": begin_us, "args": _details(line)}, {**common, "ph": "e", "ts": end_us}]

    def _mark(self, group: str, row: str, line: LogLine, at_us: float) -> None:
        self._events.append(
            {"ph": "i", "s": "t", "name": line.kind, "cat": group, "ts": at_us, **self._at(group, row), "args": _details(line)}
        )

    def _at(self, group: str, row: str) -> Event:
        return {"pid": _GROUPS.index(group) + 1, "tid": self._rows.setdefault((group, row), len(self._rows) + 1)}

    def _names(self) -> list[Event]:
        pids = {group: _GROUPS.index(group) + 1 for group, _ in self._rows}
        return [
            *(_about("process_name", pid, 0, name=f"VRAM Conductor: {group}") for group, pid in pids.items()),
            *(_about("process_sort_index", pid, 0, sort_index=pid) for pid in pids.values()),
            *(_about("thread_name", pids[group], tid, name=row) for (group, row), tid in self._rows.items()),
        ]


def _about(what: str, pid: int, tid: int, **args: JSON) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _details(line: LogLine) -> Event:
    told = {"request": line.request, "model": line.model, "bytes": line.bytes, "text": line.text or None}
    return {name: value for name, value in told.items() if value is not None}


def _microseconds(time: str) -> float:
    """Since 1970, as Ray counts."""
    return datetime.datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp() * 1e6


def trace(lines: Iterable[LogLine]) -> list[Event]:
    """Of the conductor that ran last: one that was started anew had nothing on the device."""
    traced = Trace()
    for line in lines:
        if (line.kind, line.text) == (MESSAGE, BEGINS):
            traced = Trace()
        if line.time:
            traced.add(line)
    return traced.events()


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("conductor-timeline.json"),
    with_ray: Annotated[bool, typer.Option("--ray", help="With Ray's own timeline: its tasks, by process.")] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration that names the conductor.")] = None,
) -> None:
    """Turns, swaps, loads and pools over time, from the log: open the file at ui.perfetto.dev or chrome://tracing.

    Example: conductor timeline --output trace.json --ray
    """
    with errors():
        chosen = settings(config)
        if chosen.log.format != "json":
            raise InvalidRequest("log.format", "is text; a timeline is made of a log of JSON")
        with contextlib.closing(Log(log_path(chosen))) as log:
            events = trace(log.last(lambda line: True))
        if with_ray:
            with joined():
                import ray

                events += ray.timeline()
        try:
            output.write_text(json.dumps(events), "utf-8")
        except OSError as error:
            raise InvalidRequest("output", f"{output} cannot be written: {error.strerror}") from None
        out.print(f"{len(events)} events in {output}", markup=False, soft_wrap=True)
