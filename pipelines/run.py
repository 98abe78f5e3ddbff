"""`conductor run`: a pipeline from a YAML file, or one of those that come along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.console import Exit, errors
from pipelines.session import session


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
    from pipelines import library, run_inputs, run_view
    from pipelines.library.runner import given_inputs

    with errors(as_json=as_json):
        work = library.load(pipeline)
        texts = run_inputs.given(work, inputs or [])
        if dry_run:
            run_view.show_plan(work, library.plan(work), texts, as_json=as_json)
            return
        given_inputs(work, texts)  # before anybody is looked for
        existing = run_inputs.existing(agents or [])
    with session(config, as_json=as_json) as conductor, run_view.Watcher(quiet=as_json) as watcher:
        result = library.run(work, texts, conductor=conductor, agents=existing, on_event=watcher.hear)
    run_view.show(result, output, as_json=as_json)
    raise typer.Exit(Exit.OK if result.ok else Exit.FAILED)
