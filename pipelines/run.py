"""`conductor run`: a pipeline from a YAML file, or one of those that come along."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from conductor.errors import InvalidRequest
from pipelines import library, run_view
from pipelines.console import Exit, err, errors, out, print_json, print_text
from pipelines.library.runner import given_inputs
from pipelines.library.steps import Pipeline
from pipelines.library.templates import NAME
from pipelines.session import session

_KEYED = re.compile(rf"({NAME})=(.*)", re.DOTALL)
_STANDARD_INPUT = "-"


def command(
    pipeline: Annotated[str, typer.Argument(help="A file, or one that comes along: code_crew, debate, map, vote.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="[NAME=]TEXT, or @FILE, or - for standard input. A name given again makes a list."),
    ] = None,
    agents: Annotated[
        list[str] | None, typer.Option("--agent", help="NAME=ID: let an agent that is registered already be NAME; it stays.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the final text to this file, not to standard output.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and run nothing; needs no conductor.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration file (default: that of the running service).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of the final text.")] = False,
) -> None:
    """Agents at work together: run a pipeline, with progress, and print what came of it.

    The final text goes to standard output, the table of steps with their costs to standard error. Exit code 1 if a step failed.

    Example: conductor run code_crew --input "Write a Python function that runs a shell command."
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {output.parent}", param_hint="--output")
    with errors(as_json=as_json):
        work = library.load(pipeline)
        texts = given(work, inputs or [])
        if dry_run:
            _show_plan(work, texts, as_json=as_json)
            return
        given_inputs(work, texts)  # before anybody is looked for
        existing = _existing(agents or [])
    with session(config, as_json=as_json) as conductor, run_view.Watcher(quiet=as_json) as watcher:
        result = library.run(work, texts, conductor=conductor, agents=existing, on_event=watcher.hear)
    _show(result, output, as_json=as_json)
    raise typer.Exit(Exit.OK if result.ok else Exit.FAILED)


def given(pipeline: Pipeline, options: list[str]) -> dict[str, str | list[str]]:
    """The inputs that the options name. One without a name is the first input that has no default, or the first of all.

    Raises InvalidRequest for a name that is none.
    """
    texts: dict[str, list[str]] = {}
    for option in options:
        name, value = _named(pipeline, option)
        texts.setdefault(name, []).append(_text(value))
    return {name: values if len(values) > 1 else values[0] for name, values in texts.items()}


def _named(pipeline: Pipeline, option: str) -> tuple[str, str]:
    keyed = _KEYED.fullmatch(option)
    if keyed is not None and keyed[1] in pipeline.inputs:
        return keyed[1], keyed[2]
    known = ", ".join(pipeline.inputs) or "none"
    if keyed is not None:
        raise InvalidRequest(
            "--input", f"no input {keyed[1]!r}; there are: {known}; a text that begins so needs its NAME= before it"
        )
    must_be_given = [name for name, default in pipeline.inputs.items() if default is None]
    if not pipeline.inputs:
        raise InvalidRequest("--input", f"{pipeline.name} takes none")
    return [*must_be_given, *pipeline.inputs][0], option


def _text(value: str) -> str:
    try:
        if value == _STANDARD_INPUT:
            return sys.stdin.read()
        if value.startswith("@"):
            return Path(value[1:]).read_text("utf-8")
    except (OSError, ValueError) as error:
        what = "standard input" if value == _STANDARD_INPUT else value[1:]
        raise InvalidRequest("--input", f"{what} cannot be read: {error}") from None
    return value


def _existing(options: list[str]) -> dict[str, str]:
    ids = {}
    for option in options:
        name, equals, agent_id = option.partition("=")
        if not equals or not agent_id:
            raise InvalidRequest("--agent", f"NAME=ID is expected, not {option!r}")
        ids[name] = agent_id
    return ids


def _show_plan(pipeline: Pipeline, texts: dict[str, str | list[str]], *, as_json: bool) -> None:
    plan = library.plan(pipeline)
    lists = {name: value if isinstance(value, str) else tuple(value) for name, value in texts.items()}
    if as_json:
        print_json({"pipeline": pipeline.name, "result": pipeline.outcome, "steps": [step.to_json() for step in plan.values()]})
    else:
        out.print(run_view.tree(pipeline, plan, {**pipeline.inputs, **lists}))


def _show(result: library.RunResult, output: Path | None, *, as_json: bool) -> None:
    if output is not None and result.text is not None:
        try:
            output.write_text(result.text + "\n", "utf-8")
        except OSError as error:
            err.print(Text(f"error: {output} cannot be written: {error}", style="red"), soft_wrap=True)
            raise typer.Exit(Exit.FAILED) from None
    if as_json:
        print_json(result.to_json())
        return
    if output is None and result.text is not None:
        print_text(result.text + "\n")
    err.print(run_view.table(result))
    for line in run_view.failures(result):
        err.print(Text(line, style="red"), soft_wrap=True)
