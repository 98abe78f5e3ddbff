"""The log: what the conductor decides, and whatever its packages say, a line each, in a file that is begun anew when it is large.

Whoever logs hands the record over and goes on; a thread makes lines of some of them at a time and writes those. A directory that
cannot be written to and a disk that is full cost lines and nothing else, and how many is told when there is room again.

A line tells of names, models and figures, never of a prompt, an answer or a token. Decisions come from `history` through the
logger `conductor.decisions`; docs/ray.md lists the fields, and a test holds the two together.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import queue
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from conductor.happenings import HistoryEntry

if TYPE_CHECKING:
    from conductor.config import Config

#: Of every line, in this order; a message's other fields follow.
FIELDS = ("time", "level", "conductor", "kind", "agent", "model", "request", "bytes", "ms", "text")
#: What `kind` is of a line that tells of no decision, and what such a line has besides.
MESSAGE, MESSAGE_FIELDS = "message", ("logger", "trace")

#: The message that every conductor's lines begin with: calls are numbered from 1 again.
BEGINS = "a conductor begins"

_PACKAGES = ("conductor", "actors")
_log = logging.getLogger(__name__)
_GATHER_S = 0.02
_AT_ONCE = 256
_END_WITHIN_S = 1.0
#: records that wait to be written; more come only if the disk stands still
_MOST_WAITING = 20_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def path_of(config: Config, directory: Path) -> Path:
    """The conductor's log in `directory`: named after it, and its namespace unless that is the usual one."""
    from conductor.config import RayConfig  # here: the command line takes the words above at each start

    name, namespace = config.ray.name, config.ray.namespace
    whose = name if namespace == RayConfig().namespace else f"{namespace}.{name}"
    return directory / f"conductor-{re.sub(r'[^A-Za-z0-9_.-]', '_', whose)[:100]}.log"


class Line(logging.Formatter):
    """Makes a line of a record, without its end: whatever is in it, it stays one line."""

    def __init__(self, conductor: str, *, as_json: bool) -> None:
        super().__init__()
        self._conductor, self._as_json = conductor, as_json

    def format(self, record: logging.LogRecord) -> str:
        return self._json(record) if self._as_json else self._text(record)

    def _json(self, record: logging.LogRecord) -> str:
        always = (_iso(record.created), record.levelname.lower(), self._conductor)
        if isinstance(entry := record.msg, HistoryEntry):
            ms = None if entry.ms is None else round(entry.ms, 3)
            what = (entry.kind.value, entry.agent, entry.model, entry.request, entry.bytes, ms, entry.text)
            return json.dumps(dict(zip(FIELDS, (*always, *what), strict=True)))
        agent, request = getattr(record, "agent", None), getattr(record, "request", None)
        what = (MESSAGE, agent, None, request, None, None, record.getMessage())
        more = (record.name, self._trace(record))
        return json.dumps(dict(zip((*FIELDS, *MESSAGE_FIELDS), (*always, *what, *more), strict=True)))

    def _text(self, record: logging.LogRecord) -> str:
        said = str(record.msg) if isinstance(record.msg, HistoryEntry) else f"{record.name}: {record.getMessage()}"
        trace = self._trace(record)
        line = f"{_iso(record.created)} {record.levelname.lower():<7} {self._conductor} {said}{f' {trace}' if trace else ''}"
        return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], line)

    def _trace(self, record: logging.LogRecord) -> str | None:
        return self.formatException(record.exc_info) if record.exc_info and record.exc_info[0] is not None else None


def _iso(seconds: float) -> str:
    at = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return at.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


class LogFile(logging.Handler):
    """Takes what the packages log, from now on until it is closed. Raises nothing for what a disk may do."""

    def __init__(self, config: Config, directory: Path) -> None:
        super().__init__()
        self.path = path_of(config, directory)
        self.setFormatter(Line(config.ray.name, as_json=config.log.format == "json"))
        self._file = _File(self.path, most_bytes=config.log.file_bytes, keep=config.log.keep)
        self._waiting: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
        #: lines that were lost: before they reached the thread, after it, and of these, those that were told of
        self._turned_away = self._unwritten = self._told = 0
        self._complained = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()
        self._levels_before = {name: logging.getLogger(name).level for name in _PACKAGES}
        for name in _PACKAGES:
            logging.getLogger(name).setLevel(config.log.level.upper())
            logging.getLogger(name).addHandler(self)
        _log.info(BEGINS)

    def close(self) -> None:
        """Write what is waiting, and let the loggers be as they were. Idempotent; takes at most a second."""
        if not self._ending.is_set():
            for name, level in self._levels_before.items():
                logging.getLogger(name).removeHandler(self)
                logging.getLogger(name).setLevel(level)
            self._waiting.put(None)
            self._ending.set()
            self._thread.join(_END_WITHIN_S)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        if self._waiting.qsize() >= _MOST_WAITING:
            self._turned_away += 1
            return
        try:
            if not isinstance(record.msg, HistoryEntry):  # what it names may change before the thread comes to it
                record.msg, record.args = record.getMessage(), None
            self._waiting.put(record)
        except Exception:
            self.handleError(record)

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        ended = False
        while not ended:
            some = [self._waiting.get()]
            self._ending.wait(_GATHER_S)
            with contextlib.suppress(queue.Empty):
                while len(some) < _AT_ONCE:
                    some.append(self._waiting.get_nowait())
            ended = None in some
            self._write([record for record in some if record is not None])
        self._file.close()

    def _write(self, records: list[logging.LogRecord]) -> None:
        lost = self._turned_away + self._unwritten
        if lost > self._told:
            said = f"{lost - self._told} lines could not be written and are lost"
            records = [logging.LogRecord(__name__, logging.WARNING, __file__, 0, said, None, None), *records]
        try:
            self._file.write("".join(f"{self.format(record)}\n" for record in records).encode("utf-8"))
        except Exception as error:
            self._unwritten += len(records) - (lost > self._told)
            if not self._complained:
                sys.stderr.write(f"the log {self.path} cannot be written, and lines are lost: {error}\n")
            self._complained = True
        else:
            self._told, self._complained = lost, False


class _File:
    """Appends; at `most_bytes` the file becomes `.1`, that one `.2`, up to `keep`. Raises OSError, and may be tried again."""

    def __init__(self, path: Path, *, most_bytes: int, keep: int) -> None:
        self._path, self._most_bytes, self._keep = path, most_bytes, keep
        self._open: int | None = None

    def write(self, lines: bytes) -> None:
        file = self._the_file()
        size = os.fstat(file).st_size
        if size and size + len(lines) > self._most_bytes:
            self._roll()
            file, size = self._the_file(), 0
        if size and os.pread(file, 1, size - 1) != b"\n":  # a line was cut off, by a full disk or a crash
            lines = b"\n" + lines
        while lines:
            lines = lines[os.write(file, lines) :]

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open)
            self._open = None

    def _the_file(self) -> int:
        """Open, and still the one of that name: somebody may have moved it away."""
        if self._open is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._open), self._path.lstat()):
                    return self._open
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW  # others may write to Ray's directory
        self._open = os.open(self._path, flags, 0o600)
        return self._open

    def _roll(self) -> None:
        self.close()
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._keep + 1))]
        for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)
        if not self._keep:
            self._path.unlink()
