"""The command line as somebody runs it: real processes, in an environment, a home and a runtime directory of their own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
CONDUCTOR = str(Path(sys.executable).with_name("conductor"))
_INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")


class Shell:
    def __init__(self, directory: Path) -> None:
        self.home, self.runtime = directory / "home", directory / "run"
        self.home.mkdir()
        self.environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | {
            "HOME": str(self.home),
            "CONDUCTOR_RUNTIME_DIR": str(self.runtime),
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def begin(self, *command: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
        """A command that runs on while the test does something else."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=cwd, env=self.environment | environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True,
            encoding="utf-8", errors="surrogateescape",
        )  # fmt: skip

    def run(self, *command: str, stdin: str = "", cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        with self.begin(*command, cwd=cwd, **environment) as process:
            stdout, stderr = process.communicate(stdin, timeout=180)
        assert "Traceback" not in stdout + stderr, stdout + stderr
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def conductor(
        self, *arguments: str, stdin: str = "", cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return self.run(CONDUCTOR, *arguments, stdin=stdin, cwd=cwd, **environment)

    def ok(self, *arguments: str, stdin: str = "", cwd: Path = ROOT, **environment: str) -> str:
        """Standard output of a command that must succeed."""
        result = self.conductor(*arguments, stdin=stdin, cwd=cwd, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def exports(self) -> dict[str, str]:
        """What `eval "$(conductor env)"` adds to a shell's environment."""
        lines = [line.removeprefix("export ") for line in self.ok("env").splitlines()]
        return dict(part.split("=", 1) for line in lines for part in shlex.split(line))

    def service_pid(self) -> int:
        return int(json.loads((self.runtime / "service.json").read_text())["pid"])

    def processes(self) -> list[psutil.Process]:
        """Who was started in this environment, whoever is their parent now (but for those that wrote a title over it)."""
        mine = ("CONDUCTOR_RUNTIME_DIR", str(self.runtime))
        return [process for process in psutil.process_iter() if mine in _environment(process).items()]

    def at_home(self) -> list[Path]:
        """What was written to the home directory."""
        return sorted(self.home.rglob("*"))


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def family(pid: int) -> list[psutil.Process]:
    """A process and all that came of it."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def survivors(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Who still lives after the time that processes are given to end."""
    return psutil.wait_procs(processes, timeout=30)[1]
