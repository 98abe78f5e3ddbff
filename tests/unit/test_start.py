"""The command line starts fast: what tells about commands, and what fails before a conductor is needed, loads nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import typer.main

import actors
from pipelines.cli import app
from tests.support.loading import loaded_by
from tests.support.shell import ROOT

HEAVY = ("ray", "llama_cpp", "aiohttp", "numpy", "matplotlib", "conductor.backend", "conductor.core.state")
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]

#: what nobody can carry out, and what is said of it
ERRORS: list[tuple[list[str], int, str]] = [
    (["decode"], 2, "Missing argument"),
    (["up", "--config", "/nowhere.yaml"], 1, "cannot be read"),
    (["estimate", "coder", "--config", "/nowhere.yaml"], 1, "cannot be read"),
    (["demo", "--config", "/nowhere.yaml"], 1, "cannot be read"),
    (["stream-demo", "--n-layers", "0"], 2, "n_layers"),
    (["run", "nowhere"], 2, "none that comes along"),
    (["run", "code_crew", "--input", "Add two numbers.", "--agent", "ada"], 2, "NAME=ID is expected"),
    (["logs", "--kind", "nothing"], 2, "no kind of line"),
    *((command, 1, "no conductor is running") for command in (
        ["status"], ["list"], ["register", "ada", "coder"], ["unregister", "ada"], ["decode", "ada", "Hello"], ["cancel", "ada"],
        ["chat", "coder"], ["down"], ["env"], ["board"], ["top"], ["monitor"], ["logs"], ["timeline", "--ray"],
        ["stream-demo"], ["run", "code_crew", "--input", "Add two numbers."],
    )),
]  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> Mapping[str, str]:
    """Without a service, and without a Ray of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CONDUCTOR_"))}
    return kept | {"CONDUCTOR_RUNTIME_DIR": str(tmp_path / "run"), "TERM": "dumb"}


def test_help_of_every_command_and_the_version_load_nothing_heavy(environment: Mapping[str, str]) -> None:
    asked = [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)]
    told = loaded_by(asked, watched=(*HEAVY, "conductor.config", "pipelines.library"), environment=environment)
    assert [(command, code, loaded) for command, code, loaded, _ in told] == [(command, 0, []) for command in [None, *asked]]
    assert all("Usage: " in said for command, _, _, said in told if command and "--help" in command)


def test_errors_that_need_no_ray_load_nothing_heavy(environment: Mapping[str, str]) -> None:
    told = loaded_by([command for command, _, _ in ERRORS], watched=HEAVY, environment=environment)
    for (command, code, words), (_, ended, loaded, said) in zip(ERRORS, told[1:], strict=True):
        assert (command, ended, loaded) == (command, code, [])
        assert words in " ".join(said.split()), command


def test_a_tab_in_the_shell_completes_and_loads_nothing_heavy(environment: Mapping[str, str]) -> None:
    program = f"import sys\ntry: from pipelines.cli import main; main()\nfinally: print([n for n in {HEAVY} if n in sys.modules])"
    completing = {"_CONDUCTOR_COMPLETE": "complete_bash", "COMP_WORDS": "conductor st", "COMP_CWORD": "1"}
    run = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'conductor'\n" + program],
        cwd=ROOT, env={**environment, **completing}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.stdout.splitlines() == ["status", "stream-demo", "[]"], run.stderr


def test_every_public_name_of_actors_is_found_on_its_first_use() -> None:
    assert set(actors.__all__) <= set(dir(actors))
    program = "import actors, sys\nassert 'ray' not in sys.modules\nfrom actors import *\nprint(*actors.__all__)\n"
    program += "assert all(globals()[name] is getattr(actors, name) for name in actors.__all__)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.split() == actors.__all__, run.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        actors.nothing  # type: ignore[attr-defined]  # noqa: B018
