"""A conductor's log as it is read: the lines that match, the older files before the newer, and what is added meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from conductor.errors import ServiceFailed
from conductor.log_file import path_of
from pipelines.session import joined

if TYPE_CHECKING:
    from conductor.config import Config


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of the log; one that is no JSON has its `raw` text alone."""

    raw: str
    time: str = ""
    level: str = "info"
    kind: str = ""
    agent: str | None = None
    model: str | None = None
    request: int | None = None
    bytes: int | None = None
    ms: float | None = None
    text: str = ""
    logger: str | None = None
    trace: str | None = None


_FIELDS = tuple(name for name in LogLine.__slots__ if name != "raw")
Matches = Callable[[LogLine], bool]


def parse(raw: str) -> LogLine:
    try:
        document = json.loads(raw)
        return LogLine(raw, **{name: document[name] for name in _FIELDS if name in document})
    except (ValueError, TypeError):
        return LogLine(raw)


def log_path(config: Config) -> Path:
    """Of the conductor that the configuration names. Raises NotRunning, ServiceFailed."""
    from actors.logs import log_directory

    with joined() if config.log.directory is None else contextlib.nullcontext():
        return path_of(config, log_directory(config))


class Log:
    """The log at `path`. Raises ServiceFailed if there is none, or if it cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            why = f"no log at {path} ({error.strerror}): the conductor that writes it runs elsewhere, or wrote nothing yet"
            raise ServiceFailed(why) from None
        self._cut = b""

    def last(self, matches: Matches, count: int | None = None) -> list[LogLine]:
        """Of the lines so far that match, the last `count`, or all; `news` goes on from there."""
        found: list[LogLine] = []
        backwards = (raw for file in self._files() for raw in reversed(file))
        for raw in backwards:
            if matches(line := parse(raw)):
                found.append(line)
            if len(found) == count:
                break
        return found[::-1]

    def news(self, matches: Matches) -> Iterator[LogLine]:
        """What was added since; also where a new file was begun meanwhile."""
        lines = self._newest()
        if self._was_moved():
            lines += self._newest()  # what came between the two
            with contextlib.suppress(FileNotFoundError):
                anew = self._path.open("rb")
                self._file.close()
                self._file, self._cut = anew, b""
                lines += self._newest()
        yield from filter(matches, map(parse, lines))

    def close(self) -> None:
        self._file.close()

    def _newest(self) -> list[str]:
        *whole, self._cut = (self._cut + self._file.read()).split(b"\n")
        return [line.decode("utf-8", "replace") for line in whole if line]

    def _files(self) -> Iterator[list[str]]:
        """The lines of each, the newest file first."""
        yield self._newest()
        for number in itertools.count(1):
            try:
                yield self._path.with_name(f"{self._path.name}.{number}").read_text("utf-8", "replace").splitlines()
            except OSError:
                return

    def _was_moved(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return True
