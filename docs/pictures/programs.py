"""Commands as they run by themselves: `conductor demo` in a terminal, `conductor stream-demo` with its plot."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pictures.files import draw, keep
from PIL import Image
from rich.text import Text

from tests.support.shell import CONDUCTOR

_COLUMNS = 110
_RULE = re.compile(r"^─+ (.+?) ─+$")
#: What the demo shows, by its headings, and from which line on. The rest is left out, and the picture says so.
_SHOWN = {
    "the device": "",
    "three agents, three models": "",
    "turns: ": "turns",
    "a fourth agent that does not fit": "",
    "a code crew: ": "",
    "Ray's view, after the last": "",
}


def demo(path: Path) -> None:
    """Parts of what a terminal gets of it. AssertionError if a claim of the demo does not hold."""
    lines = [Text.from_ansi(line) for line in _in_a_terminal(CONDUCTOR, "demo").splitlines()]
    draw(Text("\n").join(_abridged(lines)), path, width=_COLUMNS)


def _in_a_terminal(*command: str) -> str:
    """Everything it writes."""
    ours, its = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(_COLUMNS), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(
            command, env={**environment, "HOME": home, "CONDUCTOR_RUNTIME_DIR": home}, stdin=its, stdout=its, stderr=its
        ) as process,
    ):
        os.close(its)
        written = b"".join(_read(ours))
    assert process.returncode == 0, written.decode()
    return written.decode().replace("\r\n", "\n").rstrip()


def _read(terminal: int) -> Iterator[bytes]:
    try:
        while some := os.read(terminal, 1 << 16):
            yield some
    except OSError:  # nobody writes to it any more
        return
    finally:
        os.close(terminal)


def _abridged(lines: list[Text]) -> Iterator[Text]:
    """Whole sections, or their end, and how many lines are missing where some are."""
    shown, from_line, left_out = True, "", 0
    for line in lines:
        if heading := _RULE.match(line.plain):
            begins = [first for start, first in _SHOWN.items() if heading[1].startswith(start)]
            shown, from_line = bool(begins), "".join(begins)
        elif from_line:
            shown = line.plain.startswith(from_line)
            from_line = "" if shown else from_line
        if not shown:
            left_out += 1
            continue
        if left_out:
            yield Text(f"⋯ {left_out} lines", style="dim italic")
        left_out = 0
        yield line


def stream_demo(path: Path) -> None:
    """On this machine, by itself. CalledProcessError if a result is wrong."""
    command = (CONDUCTOR, "stream-demo", "--alone", "--repeats", "25", "--plot", str(path))
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(command, env=os.environ | {"HOME": home, "CONDUCTOR_RUNTIME_DIR": home}, check=True)
    keep(Image.open(path), path)
