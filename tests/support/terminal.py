"""A terminal with one command in it, as a person has it: what it shows, what is typed into it, and Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

_STEERING = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[()][A-Z0-9]|[=>])")
ROWS, COLUMNS = 40, 120


class Unseen(Exception):
    """The command did not show what it was to show, or did not end; with what it showed."""


class Terminal:
    """`begin` starts the command, in a session of its own, with the descriptor it is given as all of its streams."""

    def __init__(self, begin: Callable[[int], subprocess.Popen[Any]], *, within_s: float) -> None:
        self._within_s = within_s
        self._raw = b""
        self._master, streams = pty.openpty()
        try:
            fcntl.ioctl(streams, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
            self._process = begin(streams)
        finally:
            os.close(streams)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._master)

    @property
    def shown(self) -> str:
        """All since the start, without what steers the cursor and colours."""
        return _STEERING.sub("", self._raw.decode("utf-8", "replace")).replace("\r", "")

    def await_text(self, pattern: str) -> re.Match[str]:
        """Raises Unseen."""
        deadline = time.monotonic() + self._within_s
        while (found := re.search(pattern, self.shown)) is None:
            if time.monotonic() > deadline or not self._hear():
                raise Unseen(f"it did not show {pattern!r}:\n{self.shown}")
        return found

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGINT)

    def ends(self) -> int:
        """The exit code, once it has ended. Raises Unseen."""
        deadline = time.monotonic() + self._within_s
        while self._hear():
            if time.monotonic() > deadline:
                raise Unseen(f"it did not end:\n{self.shown}")
        return self._process.wait(self._within_s)

    def _hear(self) -> bool:
        """Whether there may be more to hear."""
        if not select.select([self._master], [], [], 0.5)[0]:
            return True
        try:
            heard = os.read(self._master, 1 << 16)
        except OSError:  # nobody has the other end any more
            return False
        self._raw += heard
        return bool(heard)
