"""A pipeline for a terminal: its plan as a tree, its progress as it runs, its steps with what they cost as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import typer
from rich.console import Group, RenderableType
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from conductor.units import format_bytes
from pipelines.console import Exit, err, out, print_json, print_text, printable
from pipelines.library.plan import Planned
from pipelines.library.results import AgentFailed, Event, RunResult, StepBegan, StepEnded, StepResult, StepState, TurnEnded
from pipelines.library.steps import Agent, Pipeline, kind_of

_COLOURS = {
    StepState.DONE: "green",
    StepState.FAILED: "red",
    StepState.SKIPPED: "dim",
    StepState.BLOCKED: "yellow",
    StepState.CANCELLED: "yellow",
}
_SHOWN_CHARACTERS = 60


def tree(pipeline: Pipeline, plan: Mapping[str, Planned], inputs: Mapping[str, str | tuple[str, ...] | None]) -> RenderableType:
    """Each step below the latest of those that it waits for; steps side by side run at the same time."""
    root = Tree(Text.assemble((pipeline.name, "bold"), f": {pipeline.about}" if pipeline.about else ""))
    given = root.add(Text("inputs", style="dim"))
    for name, value in inputs.items():
        given.add(Text.assemble((name, "bold"), " = ", _shown(value)))
    who = root.add(Text("agents", style="dim"))
    for name, agent in pipeline.agents.items():
        who.add(Text.assemble((name, "bold"), f": {_terms(agent)}"))
    what = root.add(Text("steps", style="dim"))
    branches: dict[str, Tree] = {}
    for name, planned in plan.items():
        latest = max(planned.needs, key=lambda need: plan[need].stage, default=None)
        branch = what if latest is None else branches[latest]
        branches[name] = branch.add(_step_line(pipeline, planned, [need for need in planned.needs if need != latest]))
    return Group(root, Text.assemble("result: ", (pipeline.outcome, "bold")))


def _step_line(pipeline: Pipeline, planned: Planned, others: list[str]) -> Text:
    step = pipeline.steps[planned.step]
    line = Text.assemble((planned.step, "bold"), f": {kind_of(step).replace('_', ' ')} {', '.join(planned.agents)}")
    for word, condition in (("when", step.when), ("unless", step.unless)):
        if condition is not None:
            compared = next(name for name in ("contains", "matches", "equals") if getattr(condition, name) is not None)
            line.append(f", {word} {condition.step} {compared} {getattr(condition, compared)!r}", style="cyan")
    if others:
        line.append(f", also after {', '.join(others)}", style="dim")
    return line


def _terms(agent: Agent) -> str:
    if agent.existing is not None:
        return f"the agent {agent.existing} that is registered already"
    window = f", {agent.window:,} tokens" if agent.window else ""
    priority = f", priority {agent.priority:+d}" if agent.priority else ""
    return f"{agent.model}, {agent.service_class}{window}{priority}"


def _shown(value: str | tuple[str, ...] | None) -> Text:
    if value is None:
        return Text("must be given", style="yellow")
    if not isinstance(value, str):
        return Text(f"{len(value)} texts")
    line = printable(" ".join(value.split()))
    return Text(line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1]}…")


def table(result: RunResult) -> RenderableType:
    """A line for each step, and what all of them cost."""
    rows = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("step", "what", "", "end"):
        rows.add_column(column, no_wrap=True)
    for column in ("turns", "prompt", "made", "queue", "moved", "time"):
        rows.add_column(column, justify="right", no_wrap=True)
    rows.add_column("", overflow="fold")
    for step in result.steps:
        cost, end = step.cost, step.finish_reason
        rows.add_row(
            Text(step.step, style="bold"), step.kind.replace("_", " "), Text(step.state.value, style=_COLOURS[step.state]),
            "–" if end is None else end.value, str(cost.turns), f"{cost.prompt_tokens:,}", f"{cost.generated_tokens:,}",
            f"{cost.queue_ms:.0f} ms", format_bytes(cost.swap_bytes), f"{step.elapsed_ms:,.0f} ms", Text(step.note),
        )  # fmt: skip
    all = result.cost
    total = Text(
        f"{all.turns} turns, {all.prompt_tokens:,} prompt tokens read and {all.reused_tokens:,} reused, "
        f"{all.generated_tokens:,} made, {format_bytes(all.swap_bytes)} moved, {result.elapsed_ms / 1000:.1f} s",
        style="dim",
    )
    return Group(rows, total)


def failures(result: RunResult) -> list[str]:
    """Each error with its step."""
    lines: list[str] = []
    for step in result.steps:
        errors = [turn.error for turn in step.turns if turn.error is not None]
        if step.error is not None and step.error not in errors:
            errors.append(step.error)
        lines += dict.fromkeys(f"{step.step}: {printable(str(error))}" for error in errors)
    return lines


class Watcher:
    """Hears a run's events: a line for each step that moves while it runs; without a terminal, a line when it has ended.

    Use it as a context around the run. Everything goes to standard error.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._lines: dict[str, TaskID] = {}
        self._tokens: dict[str, int] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), TextColumn("{task.fields[said]}", style="dim"),
            TimeElapsedColumn(), console=err, transient=True, disable=quiet or not err.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def hear(self, event: Event) -> None:
        if isinstance(event, StepBegan):
            self._lines[event.step] = self._progress.add_task(event.step, said="", total=1)
        elif isinstance(event, TurnEnded):
            result = event.turn.result
            self._tokens[event.step] = self._tokens.get(event.step, 0) + (result.generated_tokens if result else 0)
            self._progress.update(self._lines[event.step], said=f"{self._tokens[event.step]:,} tokens")
        elif isinstance(event, StepEnded):
            self._step_ended(event.result)
        elif isinstance(event, AgentFailed) and not self._quiet:
            message = printable(str(event.error)).partition("\n")[0]
            err.print(Text(f"agent {event.agent}: {message}", style="red"), soft_wrap=True)

    def _step_ended(self, result: StepResult) -> None:
        if (line := self._lines.get(result.step)) is not None:
            self._progress.update(line, completed=1, said=result.state.value)
        if not (self._quiet or err.is_terminal):
            note = f": {result.note}" if result.note else ""
            made = f", {result.cost.generated_tokens:,} tokens" if result.turns else ""
            err.print(Text(f"{result.step} {result.state.value}{made}{note}"), soft_wrap=True)


def show_plan(pipeline: Pipeline, plan: Mapping[str, Planned], texts: Mapping[str, str | list[str]], *, as_json: bool) -> None:
    """What would be done, in which order, on standard output."""
    lists = {name: value if isinstance(value, str) else tuple(value) for name, value in texts.items()}
    if as_json:
        print_json({"pipeline": pipeline.name, "result": pipeline.outcome, "steps": [step.to_json() for step in plan.values()]})
    else:
        out.print(tree(pipeline, plan, {**pipeline.inputs, **lists}))


def show(result: RunResult, output: Path | None, *, as_json: bool) -> None:
    """The final text on standard output or in a file, what it cost on standard error."""
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
    err.print(table(result))
    for line in failures(result):
        err.print(Text(line, style="red"), soft_wrap=True)
