"""Running a pipeline: from a program, from inside a Ray task, from a notebook.

    result = run(pipeline, {"request": "…"})             # waits; Ctrl-C ends the turns and lets the agents go
    result = await arun(pipeline, {"request": "…"})      # where a loop runs
    running = start(pipeline, {"request": "…"})          # in a thread; running.cancel(), running.result()

Each step is a task that waits for those it needs. What a step does is in `work`, whose agents in `team`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import actors
from conductor.errors import InvalidRequest
from pipelines.library.plan import plan
from pipelines.library.results import Event, RunResult, StepBegan, StepEnded, StepResult, StepState, Turn, TurnEnded
from pipelines.library.steps import Pipeline, kind_of
from pipelines.library.templates import fill
from pipelines.library.work import Outcome, Worker

if TYPE_CHECKING:
    from pipelines.library.team import Team

Inputs = Mapping[str, str | Sequence[str]]
Listener = Callable[[Event], None]

#: how long turns that are cancelled may take to end; then nobody waits for them, and their agents leave
_END_WITHIN_S = 10.0
#: how often they are told to: one may be on its way to the conductor when it is told first
_AGAIN_S = 0.2


def run(pipeline: Pipeline, inputs: Inputs | None = None, **options: Any) -> RunResult:
    """Run a pipeline and wait; where a loop runs, too, in a thread beside it.

    `inputs`: a text or several for each of its inputs, unless that has a default. `options` are those of `arun`, and so is what
    is raised. Ctrl-C ends the turns that run, lets the agents go, and is raised.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(arun(pipeline, inputs, **options))
    running = start(pipeline, inputs, **options)
    try:
        return running.result()
    except KeyboardInterrupt:
        running.cancel()
        running.result()
        raise


async def arun(
    pipeline: Pipeline,
    inputs: Inputs | None = None,
    *,
    conductor: Any = None,
    agents: Mapping[str, Any] | None = None,
    on_event: Listener = lambda event: None,
) -> RunResult:
    """Run a pipeline where a loop runs. A step that fails is in the result, and fails only those that need it.

    `conductor`: its handle; None finds it, or starts it. `agents`: by their names in the pipeline, AgentActors or ids of agents
    that are registered already; they stay. `on_event` hears what happens, on the loop's thread; what it raises ends the run.
    Raises ConfigError if the pipeline is wrong, InvalidRequest for inputs and agents that do not belong to it, ServiceFailed.
    """
    return await _Run(pipeline, inputs, conductor=conductor, agents=agents, on_event=on_event).run()


def start(pipeline: Pipeline, inputs: Inputs | None = None, **options: Any) -> Running:
    """Run a pipeline in a thread of its own. `options` are those of `arun`, which says what is raised, here at once."""
    return Running(_Run(pipeline, inputs, **options))


class Running:
    """A run in a thread."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._outcome: Future[RunResult] = Future()
        threading.Thread(target=self._work, name="pipeline", daemon=True).start()

    def _work(self) -> None:
        try:
            self._outcome.set_result(asyncio.run(self._run.run()))
        except BaseException as error:
            self._outcome.set_exception(error)

    @property
    def done(self) -> bool:
        """It ended, with a result or an error."""
        return self._outcome.done()

    def cancel(self) -> None:
        """End the turns that run and begin no others; the result says what was done until then."""
        self._run.stop()

    def result(self, timeout_s: float | None = None) -> RunResult:
        """Wait for it. Raises TimeoutError, and what `arun` raises."""
        return self._outcome.result(timeout_s)


class _Run:
    """One run of one pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        inputs: Inputs | None,
        *,
        conductor: Any = None,
        agents: Mapping[str, Any] | None = None,
        on_event: Listener = lambda event: None,
    ) -> None:
        self._pipeline, self._given, self._tell = pipeline, agents or {}, on_event
        self._plan = plan(pipeline)
        self._inputs = given_inputs(pipeline, inputs or {})
        if strangers := [name for name in self._given if name not in pipeline.agents]:
            raise InvalidRequest("agents", f"no agent {strangers[0]!r}; there are: {', '.join(pipeline.agents)}")
        # On the caller's thread: `ray.get_actor` waits for ever where a thread that has ended made the actor.
        self._conductor = actors.connect() if conductor is None else conductor
        self._steps: dict[str, asyncio.Task[StepResult]] = {}
        self._stopped = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """From any thread."""
        self._stopped.set()
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # it is over
                loop.call_soon_threadsafe(self._wake.set)

    async def run(self) -> RunResult:
        from pipelines.library.team import Team

        began = time.monotonic()
        self._wake, self._loop = asyncio.Event(), asyncio.get_running_loop()
        used = {agent for planned in self._plan.values() for agent in planned.agents}
        agents = {name: agent for name, agent in self._pipeline.agents.items() if name in used}
        async with Team(self._conductor, agents, prefix=self._pipeline.name, given=self._given, tell=self._tell) as team:
            self._steps = {name: asyncio.create_task(self._step(name, team)) for name in self._plan}
            try:
                await self._all_steps(team)
            finally:
                for task in self._steps.values():
                    task.cancel()
        steps = tuple(self._steps[name].result() for name in self._pipeline.steps)
        text = self._steps[self._pipeline.outcome].result().text
        return RunResult(self._pipeline.name, text, steps, _ms_since(began))

    async def _all_steps(self, team: Team) -> None:
        """Until all ended, or were told to. Raises what a listener raised."""
        told = asyncio.create_task(self._wake.wait())
        if self._stopped.is_set():
            self._wake.set()
        pending = set(self._steps.values())
        try:
            while pending and not self._stopped.is_set():
                await asyncio.wait([*pending, told], return_when=asyncio.FIRST_COMPLETED)
                pending = _still_running(pending)
        finally:
            told.cancel()
        deadline = time.monotonic() + _END_WITHIN_S
        while pending and time.monotonic() < deadline:
            await team.cancel_turns()
            await asyncio.wait(pending, timeout=_AGAIN_S)
            pending = _still_running(pending)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)

    async def _step(self, name: str, team: Team) -> StepResult:
        needs = self._plan[name].needs
        if needs:
            await asyncio.wait([self._steps[need] for need in needs])
        before = {need: self._steps[need].result() for need in needs}
        result = self._not_to_be_done(name, before)
        if result is None:
            result = await self._done(name, before, team)
        self._tell(StepEnded(result))
        return result

    def _not_to_be_done(self, name: str, before: Mapping[str, StepResult]) -> StepResult | None:
        """Why a step is not begun, as its result; None if it is to be done."""
        step = self._pipeline.steps[name]

        def ended(state: StepState, why: str, text: str | None = None) -> StepResult:
            return StepResult(name, kind_of(step), state, text, note=why)

        if self._stopped.is_set():
            return ended(StepState.CANCELLED, "the run was cancelled before it began")
        for need in before.values():
            if need.state in (StepState.FAILED, StepState.BLOCKED, StepState.CANCELLED):
                return ended(StepState.BLOCKED, f"needs {need.step}, which {_WHAT_HAPPENED[need.state]}")
            if need.text is None:
                return ended(StepState.SKIPPED, f"needs {need.step}, which was skipped")
        for condition, expected in ((step.when, True), (step.unless, False)):
            if condition is not None and condition.holds(before[condition.step].text or "") is not expected:
                text = None if step.otherwise is None else fill(step.otherwise, self._texts(before))
                why = "does not say so" if expected else "says so"
                return ended(StepState.SKIPPED, f"{condition.step} {why}", text)
        return None

    async def _done(self, name: str, before: Mapping[str, StepResult], team: Team) -> StepResult:
        began, step = time.monotonic(), self._pipeline.steps[name]
        self._tell(StepBegan(name))
        lists = {input: value for input, value in self._inputs.items() if not isinstance(value, str)}

        def tell(turn: Turn) -> None:
            self._tell(TurnEnded(name, turn))

        outcome = await Worker(team, self._texts(before), lists, tell=tell).do(step)
        return StepResult(
            name, kind_of(step), self._state(outcome), outcome.text, outcome.answers, tuple(outcome.turns), _ms_since(began),
            outcome.note, outcome.error,
        )  # fmt: skip

    def _state(self, outcome: Outcome) -> StepState:
        if outcome.error is None:
            return StepState.DONE
        return StepState.CANCELLED if self._stopped.is_set() else StepState.FAILED

    def _texts(self, before: Mapping[str, StepResult]) -> dict[str, str]:
        inputs = {name: value if isinstance(value, str) else "\n\n".join(value) for name, value in self._inputs.items()}
        return inputs | {name: result.text or "" for name, result in before.items()}


_WHAT_HAPPENED = {StepState.FAILED: "failed", StepState.BLOCKED: "could not be done", StepState.CANCELLED: "was cancelled"}


def given_inputs(pipeline: Pipeline, given: Inputs) -> dict[str, str | tuple[str, ...]]:
    """A text or several for each input: those given, else their defaults. Raises InvalidRequest."""
    for name in given:
        if name not in pipeline.inputs:
            raise InvalidRequest("inputs", f"no input {name!r}; there are: {', '.join(pipeline.inputs) or 'none'}")
    return {name: _text("inputs." + name, given.get(name, default)) for name, default in pipeline.inputs.items()}


def _text(argument: str, value: object) -> str | tuple[str, ...]:
    if value is None:
        raise InvalidRequest(argument, "has no default and must be given")
    if isinstance(value, str):
        return value
    items = tuple(value) if isinstance(value, Sequence) else (value,)
    texts = tuple(item for item in items if isinstance(item, str))
    if len(texts) < len(items):
        raise InvalidRequest(argument, f"a text or several are expected, not {type(value).__name__}")
    return texts


def _still_running(tasks: set[asyncio.Task[StepResult]]) -> set[asyncio.Task[StepResult]]:
    """Raises what one that ended raised."""
    for task in tasks:
        if task.done():
            task.result()
    return {task for task in tasks if not task.done()}


def _ms_since(began: float) -> float:
    return (time.monotonic() - began) * 1000
