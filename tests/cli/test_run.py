"""`conductor run` as somebody runs it: what it prints where, its exit codes, and that nobody stays registered."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from conductor.errors import InvalidRequest
from pipelines.cli import app
from pipelines.library import Agent, Ask, Pipeline
from pipelines.run_inputs import given
from tests.support.conducting import document_of
from tests.support.eventually import eventually
from tests.support.parrot import write_parrot
from tests.support.shell import CONDUCTOR, Shell
from tests.support.talk import SHIPPED, TASK

ENDLESS = """
agents: {ada: {model: endless, options: {max_tokens: 100000000}}}
steps: {s: {ask: ada, prompt: x}}
"""
HALF_BROKEN = """
agents: {ada: {model: coder}, poet: {model: poet}}
inputs: {request: null, hint: ""}
steps:
  code: {ask: ada, prompt: "{request}{hint}", keep: code}
  poem: {ask: poet, prompt: "{code}"}
  ode: {ask: ada, prompt: "{poem}"}
result: code
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """With the shipped models and one that never ends; at the end nobody is registered."""
    directory = tmp_path_factory.mktemp("run")
    endless = write_parrot(directory / "endless.gguf", "abcdefghij", ends=False)
    models = {**SHIPPED, "endless": {"path": str(endless), "context_shift": True}}
    (directory / "conductor.yaml").write_text(yaml.safe_dump(document_of("vram_mib", directory, models)))
    shell = Shell(directory)
    shell.ok("up", "--config", str(directory / "conductor.yaml"))
    yield shell
    left = shell.json("list")
    shell.ok("down")
    assert left == []


@pytest.fixture
def half_broken(tmp_path: Path) -> Path:
    path = tmp_path / "half-broken.yaml"
    path.write_text(HALF_BROKEN)
    return path


# --- with a service -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_final_text_is_the_output_and_the_costs_are_told_beside_it(service: Shell, tmp_path: Path) -> None:
    ran = service.conductor("run", "vote", "--input", TASK)
    assert (ran.returncode, ran.stdout) == (0, "def add(a, b):\n    return a + b\n")
    assert re.search(r"^answer +fan out +done +eos +3 ", ran.stderr, re.MULTILINE), ran.stderr
    assert "3 of 3 agree" in ran.stderr

    written = tmp_path / "answer.py"
    ran = service.conductor("run", "vote", "--input", "question=-", "--output", str(written), "--json", stdin=TASK)
    told = json.loads(ran.stdout)
    assert (ran.returncode, ran.stderr, told["ok"]) == (0, "", True)
    assert written.read_text() == told["text"] + "\n"
    [step] = told["steps"]
    assert (step["state"], step["cost"]["turns"], len(step["turns"])) == ("done", 3, 3)
    assert step["cost"].keys() >= {"prompt_tokens", "generated_tokens", "queue_ms", "swap_bytes"}


@pytest.mark.slow
def test_a_step_that_fails_is_named_and_is_exit_code_1(service: Shell, half_broken: Path) -> None:
    ran = service.conductor("run", str(half_broken), "-i", TASK)
    assert (ran.returncode, ran.stdout) == (1, "def add(a, b):\n    return a + b\n")
    lines = [line.split()[:3] for line in ran.stderr.splitlines()]
    assert ["code", "ask", "done"] in lines
    assert ["poem", "ask", "failed"] in lines
    assert ["ode", "ask", "blocked"] in lines
    assert "needs poem, which failed" in ran.stderr
    assert "poem: no model 'poet' in the configuration; there are: coder, documenter, endless, reviewer" in ran.stderr


@pytest.mark.slow
def test_whoever_ends_it_leaves_nobody(service: Shell, tmp_path: Path) -> None:
    path = tmp_path / "endless.yaml"
    path.write_text(ENDLESS)
    with service.begin(CONDUCTOR, "run", str(path)) as run:
        eventually(lambda: [agent["busy"] for agent in service.json("list")] == [True], within_s=60)
        run.send_signal(signal.SIGINT)
        stdout, stderr = run.communicate(timeout=60)
    assert (run.returncode, stdout, stderr) == (130, "", "")
    assert service.json("list") == []


# --- without a service --------------------------------------------------------------------------------------------------


def test_the_plan_is_shown_without_a_service() -> None:
    arguments = ["run", "code_crew", "--dry-run", "--input", "request=Write [b]it[/b]."]
    lines = [line.strip("│ ├└─") for line in CliRunner().invoke(app, arguments).stdout.splitlines()]
    assert lines[0].startswith("code_crew: coder, then reviewer and documenter")
    assert "request = Write [b]it[/b]." in lines
    assert lines.index("code: ask coder") + 1 == lines.index("review: ask reviewer")
    assert "final: ask coder, unless review contains 'No security flaws', also after code" in " ".join(lines)  # or wrapped
    assert lines[-1] == "result: final"
    plan = json.loads(CliRunner().invoke(app, ["run", "code_crew", "--dry-run", "--json"]).stdout)
    assert [(step["step"], step["stage"]) for step in plan["steps"]] == [
        ("code", 0), ("review", 1), ("documentation", 1), ("final", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("vtoe",), 2, "error: pipeline: no file 'vtoe', and none that comes along; those are: code_crew, debate, map, vote\n"),
        (("vote",), 2, "error: inputs.question: has no default and must be given\n"),
        (("vote", "-i", "x", "--output", "nowhere/x"), 2, "there is no directory nowhere"),
        (("vote", "-i", "x", "--agent", "ada"), 2, "error: --agent: NAME=ID is expected, not 'ada'\n"),
        (("vote", "-i", "@nowhere.txt"), 2, "error: --input: nowhere.txt cannot be read: "),
        (("nowhere.yaml",), 1, "error: nowhere.yaml: cannot be read: "),
    ],
)
def test_what_cannot_be_run_is_said_before_anybody_is_looked_for(arguments: tuple[str, ...], code: int, message: str) -> None:
    failed = CliRunner().invoke(app, ["run", *arguments], env={"COLUMNS": "200"})
    assert (failed.exit_code, failed.stdout) == (code, "")
    assert message in failed.stderr


def test_it_needs_a_conductor_and_says_how_to_start_one(tmp_path: Path) -> None:
    failed = Shell(tmp_path).conductor("run", "vote", "-i", "x")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "error: no conductor is running; start one with: conductor up\n"


def test_inputs_are_read_by_name_from_files_and_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Pipeline(
        name="p", inputs={"style": "short", "request": None}, agents={"a": Agent("m")}, steps={"s": Ask("a", "{request}")}
    )
    path = tmp_path / "x.txt"
    path.write_text("from a file\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("from standard input"))
    assert given(work, ["-"]) == {"request": "from standard input"}
    assert given(work, [f"@{path}", "style=a=b"]) == {"request": "from a file\n", "style": "a=b"}
    assert given(work, [f"request=@{path}", "request=and more"]) == {"request": ["from a file\n", "and more"]}
    assert given(work, ["f(x=1)"]) == {"request": "f(x=1)"}
    assert given(work, []) == {}
    with pytest.raises(InvalidRequest, match="no input 'stile'; there are: style, request"):
        given(work, ["stile=long"])
    with pytest.raises(InvalidRequest, match="p takes none"):
        given(work.model_copy(update={"inputs": {}}), ["x"])
