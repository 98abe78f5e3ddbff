"""Mutants put to the test: a conductor in a child process that takes each for a model, and a watcher that survives it.

The child registers the mutant, lets it speak, unregisters it, and looks whether everything is as it was. It serves another
agent all the while, whose answers must not change. A child that dies or hangs is an outcome: another takes over.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from tests.support.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
WORKED, CRASHED, HUNG, UNTYPED = "worked", "CRASHED", "HUNG", "UNTYPED"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a mutant ended: `registered` and each of `turns` is WORKED or the type of an error; `wrong` must be empty."""

    registered: str
    message: str = ""
    turns: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    rss_bytes: int = 0  #: of the child, afterwards

    @property
    def name(self) -> str:
        """For a table."""
        failed = [turn for turn in self.turns if turn != WORKED]
        return f"{failed[0]} in a turn" if self.registered == WORKED and failed else self.registered


class Trial:
    """`with Trial(directory) as trial: trial.put(mutant)`. All mutants come to stand under the same name."""

    def __init__(self, directory: Path, *, patience_s: float = 30.0, root: Path = ROOT) -> None:
        self._directory, self._patience_s, self._root = directory, patience_s, root
        self._path = directory / "mutants" / "mutant.gguf"
        self._path.parent.mkdir()
        self._child: subprocess.Popen[str] | None = None
        self._complaints: IO[bytes] | None = None
        self.children = 0

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def put(self, mutant: Mutant) -> Outcome:
        _clear(self._path)
        mutant.place(self._path)
        self._started()
        began = time.monotonic()
        self._say({"path": str(self._path), "pause": mutant.later is not None})
        heard = self._heard(began)
        if heard == {"priced": True}:
            assert mutant.later is not None
            mutant.later(self._path)
            self._say({})
            heard = self._heard(began)
        if heard is not None:
            return Outcome(**heard)
        seconds = time.monotonic() - began
        what = HUNG if seconds >= self._patience_s else CRASHED
        return Outcome(what, self._end(), wrong=[what], seconds=seconds)

    def _say(self, message: dict[str, Any]) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()

    def _heard(self, since: float) -> dict[str, Any] | None:
        """The child's next line; None if it died, or if it is silent for too long."""
        assert self._child is not None
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], max(0, since + self._patience_s - time.monotonic()))
        line = self._child.stdout.readline() if ready else ""
        heard: dict[str, Any] | None = json.loads(line) if line else None
        return heard

    def _started(self) -> None:
        if self._child is not None:
            return
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the child
        self._child = subprocess.Popen(
            [sys.executable, "-c", "from tests.support.trial_child import main; main()", str(self._directory)],
            cwd=self._root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=os.environ | {"PYTHONPATH": str(self._root), "CUDA_VISIBLE_DEVICES": ""},
        )
        self.children += 1
        if self._heard(time.monotonic()) is None:
            raise RuntimeError(f"the child did not start: {self._end()}")

    def _end(self) -> str:
        """Let the child go, or make it go with all that it started; its exit code and the end of what it said."""
        if self._child is None or self._complaints is None:
            return ""
        child, self._child = self._child, None
        family = psutil.Process(child.pid).children(recursive=True) if child.poll() is None else []
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            child.communicate(timeout=5)
        child.kill()
        for orphan in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()
        child.communicate()
        self._complaints.seek(0)
        said = self._complaints.read().decode("utf-8", "replace").strip().splitlines()
        self._complaints.close()
        how = signal.Signals(-child.returncode).name if child.returncode < 0 else f"exit code {child.returncode}"
        return "; ".join([how, *said[-3:]])


def _clear(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
