"""`conductor logs`: what the conductor decided, from its log file, also of one that has ended."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from conductor.errors import InvalidRequest
from conductor.happenings import Happening
from conductor.log_file import MESSAGE
from conductor.units import format_bytes
from pipelines.console import errors, out, print_text, printable
from pipelines.log_lines import Log, LogLine, Matches, log_path
from pipelines.session import settings

_KINDS = (*(kind.value for kind in Happening), MESSAGE)
_STYLES = {"error": "red", "warning": "yellow", "debug": "dim"}
_LOOK_EVERY_S = 0.2


def that_match(agents: list[str] | None, kinds: list[str] | None, request: int | None) -> Matches:
    """Raises InvalidRequest for a kind that there is not."""
    for kind in kinds or ():
        if kind not in _KINDS:
            raise InvalidRequest("kind", f"{kind!r} is no kind of line; there are: {', '.join(_KINDS)}")

    def matches(line: LogLine) -> bool:
        return (
            (not agents or line.agent in agents)
            and (not kinds or line.kind in kinds)
            and (request is None or line.request == request)
        )

    return matches


def for_people(line: LogLine) -> str:
    """One line; that of a log of texts, or of a line that was cut off, is as it is."""
    if not line.time:
        return printable(line.raw)
    when = f"{line.time[:10]} {line.time[11:23]}"
    number = "" if line.request is None else f"#{line.request}"
    who = " ".join(filter(None, (line.agent, line.model)))
    size = "" if line.bytes is None else format_bytes(line.bytes)
    took = "" if line.ms is None else f"{line.ms:,.1f} ms"
    text = f"{line.logger}: {line.text}" if line.logger else line.text
    cause = f" ({line.trace.splitlines()[-1]})" if line.trace else ""
    said = f"{when} {line.kind:<11} {number:>5} {who:<18} {size:>8} {took:>10} {text}{cause}"
    return printable(" ".join(said.splitlines())).rstrip()


def command(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added, until Ctrl-C.")] = False,
    agent: Annotated[list[str] | None, typer.Option(help="Of this agent; may be given several times.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Of this kind, such as refused; may be given several times.")] = None,
    request: Annotated[int | None, typer.Option(help="Of this call, from its being asked to its answer.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="The last so many; 0: all that are kept.")] = 50,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration that names the conductor.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The lines as they are in the file.")] = False,
) -> None:
    """What was decided, a line each: who was admitted or refused and why, loads, swaps, turns. Times are UTC.

    Example: conductor logs -f --agent ada
    """
    with errors(as_json=as_json):
        matches = that_match(agent, kind, request)
        with contextlib.closing(Log(log_path(settings(config)))) as log:
            for line in log.last(matches, lines or None):
                _print(line, as_json=as_json)
            while follow:
                for line in log.news(matches):
                    _print(line, as_json=as_json)
                time.sleep(_LOOK_EVERY_S)


def _print(line: LogLine, *, as_json: bool) -> None:
    if as_json:
        print_text(f"{line.raw}\n")
    else:
        out.print(Text(for_people(line), style=_STYLES.get(line.level, "")), soft_wrap=True)
