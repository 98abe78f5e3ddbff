"""`conductor monitor --json` as a process of its own."""

from __future__ import annotations

import json
import signal
from typing import Any

from tests.support.shell import CONDUCTOR, Shell, family, survivors


class Monitor:
    """It takes free ports. With `PATH` among the environment it finds other programs."""

    def __init__(self, shell: Shell, *options: str, **environment: str) -> None:
        ports = ("--prometheus-port", "0", "--grafana-port", "0")
        self.process = shell.begin(CONDUCTOR, "monitor", "--json", *ports, *options, **environment)

    def report(self) -> Any:
        """What it says once all is up."""
        assert self.process.stdout is not None
        lines: list[str] = []
        while (line := self.process.stdout.readline()) and line != "}\n":
            lines.append(line)
        return json.loads("".join([*lines, line]))

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """Interrupt it; its exit code and what it complained of. Nothing that it started may live on."""
        processes = family(self.process.pid)
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=60)
        assert survivors(processes) == []
        return self.process.returncode, stderr
