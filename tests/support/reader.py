"""Somebody who does what a page says: types its commands into one terminal, runs its programs, and looks at what it starts.

Each page has a directory with the checkout in it, a home, a conductor of its own, and one environment that its commands change
(`. .venv/bin/activate`, `export`, `cd`). A conductor with the built-in configuration is started before a block that needs one and
does not start one itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.shell import ROOT, Shell, family, survivors
from tests.support.snippets import Block, Command, commands
from tests.support.terminal import Terminal, Unseen

WITHIN_S = 180.0

#: of `make` what runs here; of other targets it is only seen that they are there
MADE = {"help", "demo"}
#: what commands only read, and what they may write to
_LINKED, _COPIED = ("conductor", "actors", "pipelines", "models"), ("benchmarks", "configs", "docs", "notebooks")

#: blocks of one program come as lines of JSON; after each the end is told
_PROGRAM = """
import json, sys
names = {"__name__": "__main__"}
for line in sys.stdin:
    text, place, end = json.loads(line)
    exec(compile(text, place, "exec"), names)
    print("\\n" + end, flush=True)
"""


class Failed(Exception):
    """What the page says did not happen."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A command that does not end by itself: what is typed into it, when it is seen to work, and how it is ended."""

    shows: str  #: a regular expression
    says: str = ""
    begins: str = ""  #: what it shows before something is said to it
    end: str = ""  #: what is typed to end it; else Ctrl-C


#: by the first words of the command; an address that is shown must answer
SIGHTS = {
    "conductor chat": Sight(r"made \(", begins="Ctrl-D ends", says="Write a function that adds two numbers.\n", end="\x04"),
    "conductor board": Sight(r"board at (http://\S+)"),
    "conductor top": Sight(r"booked"),
    "conductor monitor": Sight(r"metrics at (http://[^\s,]+)"),
}


class Reader:
    """Of the blocks of one page. `directory`: an empty one, for everything."""

    def __init__(self, blocks: Sequence[Block], directory: Path) -> None:
        self._shell = Shell(directory)
        self._shell.environment["TERM"] = "xterm-256color"
        self._shell.environment["CUDA_VISIBLE_DEVICES"] = "none"  # the device is the host's, whatever this machine has
        self._checkout, self._state = directory / "checkout", directory / "state.sh"
        self._blocks = list(blocks)
        self._failed = ""
        self._program: _Program | None = None
        _check_out(self._checkout)
        for block in blocks:
            if block.file:
                (self._checkout / block.file).write_text(block.text, "utf-8")
        state = f"cd {shlex.quote(str(self._checkout))}\n"
        if not any("bin/activate" in block.text for block in blocks):
            state += f"export VIRTUAL_ENV={shlex.quote(sys.prefix)} PATH={shlex.quote(f'{sys.prefix}/bin')}:$PATH\n"
        self._state.write_text(state)

    # --- blocks -----------------------------------------------------------------------------------------------------

    def read(self, block: Block) -> None:
        """Do what it says, after what those before it say, unless that is done. Raises Failed."""
        if self._failed:
            raise Failed(f"{block.place}: not tried, because {self._failed} failed")
        while self._blocks and self._blocks[0].line <= block.line:
            self._failed = self._blocks[0].place
            self._do(self._blocks.pop(0))
            self._failed = ""

    def _do(self, block: Block) -> None:
        if block.order == "skip" or not block.runs:
            return
        if not self._serves() and _wants_service(block):
            self._command(Command(block.line, "conductor up", 0), block)
        if block.language == "python":
            self._run(block)
            return
        for command in commands(block):
            self._command(command, block)

    def _serves(self) -> bool:
        return (self._shell.runtime / "service.json").exists()

    def _run(self, block: Block) -> None:
        if self._program is None:
            self._program = _Program(self._popen(f"exec python -u -c {shlex.quote(_PROGRAM)}", stdin=subprocess.PIPE))
        self._program.run(block)
        following = next((later.order for later in self._blocks if later.language == "python"), "")
        if following != "continues":
            self._end_program()

    def _end_program(self) -> None:
        program, self._program = self._program, None
        if program is not None:
            program.end()

    def _command(self, command: Command, block: Block) -> None:
        words = shlex.split(command.text, comments=True)
        sight = SIGHTS.get(" ".join(words[:2])) if "--help" not in words else None
        try:
            if sight is not None:
                self._look(command.text, sight)
            else:
                self._type(_made(words) if words[0] == "make" else command.text, command.exit_code)
        except Failed as failure:
            raise Failed(f"{block.page}:{command.line}: {command.text}\n{failure}") from None

    # --- commands ---------------------------------------------------------------------------------------------------

    def _popen(self, script: str, **streams: int | None) -> subprocess.Popen[bytes]:
        """In the terminal as the commands so far left it."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | streams
        script = f"set -a; . {shlex.quote(str(self._state))}\n{script}"
        return subprocess.Popen(["bash", "-c", script], env=self._shell.environment, start_new_session=True, **options)  # type: ignore[call-overload, no-any-return]

    def _type(self, command: str, exit_code: int = 0) -> None:
        """Raises Failed with what it printed."""
        keep = f"{{ export -p; declare -f; printf 'cd %q\\n' \"$PWD\"; }} > {shlex.quote(str(self._state))}"
        process = self._popen(f"{command}\n__code=$?\n{keep}\nexit $__code")
        with _killed_late(process):
            said = process.communicate()[0].decode("utf-8", "replace")
        if process.returncode != exit_code:
            raise Failed(f"exit code {process.returncode} instead of {exit_code}:\n{said}")
        if "Traceback (most recent call last)" in said:
            raise Failed(f"it shows a traceback:\n{said}")

    def _look(self, command: str, sight: Sight) -> None:
        begin = lambda end: self._popen(f"exec {command}", stdin=end, stdout=end, stderr=end)
        with Terminal(begin, within_s=WITHIN_S) as terminal:
            try:
                if sight.says:
                    terminal.await_text(sight.begins)
                    terminal.type(sight.says)
                for address in terminal.await_text(sight.shows).groups():
                    with urllib.request.urlopen(address, timeout=30) as answer:
                        answer.read(1)
                if sight.end:
                    terminal.type(sight.end)
                else:
                    terminal.interrupt()
                code = terminal.ends()
            except (Unseen, OSError) as problem:
                raise Failed(str(problem)) from problem
            if code not in (0, 130):
                raise Failed(f"it ended with {code}:\n{terminal.shown}")

    # --- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """The conductor goes, if there is one. Raises Failed if a process stays."""
        with contextlib.suppress(Failed):
            self._end_program()
        processes = self._shell.processes()
        if self._serves():
            processes += family(self._shell.service_pid())
            self._type("conductor down")
        left = survivors(processes)
        for process in left:
            process.kill()
        shutil.rmtree(self._checkout)
        if left:
            raise Failed(f"processes that stay: {[process.cmdline() for process in left]}")


def _check_out(directory: Path) -> None:
    """What somebody has who cloned the repository and made its environment."""
    directory.mkdir()
    for name in _LINKED:
        (directory / name).symlink_to(ROOT / name)
    for name in _COPIED:
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, directory)
    (directory / ".venv").symlink_to(sys.prefix)
    if git := shutil.which("git"):
        subprocess.run([git, "init", "--quiet", str(directory)], check=True)


def _made(words: list[str]) -> str:
    """The environment is there, whatever its date says."""
    targets = {word for word in words[1:] if "=" not in word}
    return shlex.join(["make", "-o", ".venv/.vram-conductor", *([] if targets <= MADE else ["-n"]), *words[1:]])


def _wants_service(block: Block) -> bool:
    """A conductor that runs: all that talks to one, unless it starts it."""
    if block.language == "python":
        return re.search(r"\b(?:actors|ray|pipelines)\b", block.text) is not None
    typed = "\n".join(shlex.join(shlex.split(command.text, comments=True)) for command in commands(block))
    return "conductor up" not in typed and re.search(r"\b(?:conductor|ray) ", typed) is not None


@contextlib.contextmanager
def _killed_late(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(WITHIN_S, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Program:
    """Python that is told one block after the other."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def run(self, block: Block) -> None:
        """Raises Failed with what it printed, if it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        end = f"--- end of {block.place} ---"
        text = "\n" * block.line + block.text  # so that a traceback names lines of the page
        self._process.stdin.write(json.dumps([text, block.page, end]).encode() + b"\n")
        self._process.stdin.flush()
        said: list[str] = []
        with _killed_late(self._process):
            for line in self._process.stdout:
                said.append(line.decode("utf-8", "replace"))
                if said[-1] == f"{end}\n":
                    return
        self._process.communicate()
        raise Failed(f"{block.place}: the program ended with {self._process.returncode}:\n{''.join(said)}")

    def end(self) -> None:
        """Raises Failed if it does not end well."""
        with _killed_late(self._process):
            said = self._process.communicate()[0].decode("utf-8", "replace")
        if self._process.returncode:
            raise Failed(f"the program's end was {self._process.returncode}:\n{said}")
