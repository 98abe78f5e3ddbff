"""What the command line loads: commands one after the other in a fresh interpreter, and which modules each had brought in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

from tests.support.shell import ROOT

_PROGRAM = """
import contextlib, io, json, sys
from pipelines.cli import app

commands, watched = json.loads(sys.argv[1])
told = []
for command in [None, *commands]:
    code, said = 0, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if command is not None:
                app(command)
        except SystemExit as ended:
            code = ended.code or 0
    told.append([command, int(code), [name for name in watched if name in sys.modules], said.getvalue()])
print(json.dumps(told))
"""


def loaded_by(
    commands: Iterable[Sequence[str]], *, watched: Iterable[str], environment: Mapping[str, str]
) -> list[tuple[list[str] | None, int, list[str], str]]:
    """(command, its exit code, those watched that are loaded by then, what it printed); the first is of the import alone."""
    asked = json.dumps([[list(command) for command in commands], list(watched)])
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, asked], cwd=ROOT, env=dict(environment), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [tuple(told) for told in json.loads(run.stdout)]
