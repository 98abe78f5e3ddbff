"""Three agents at work: a coder writes a function, then a reviewer and a documenter work on it at the same time.

    with CodeCrew() as crew:
        print(crew.run("Write a Python function `is_prime(n)` that checks whether a number is prime.").code)

The agents stay for several requests. `conductor run code_crew` has a crew for one, whose coder minds the review.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray

import actors
from conductor.types import DecodeResult, Record
from pipelines.library import Agent, Ask, Event, Options, Pipeline, TurnEnded, run
from pipelines.library.answers import code_in

__all__ = ["DOCUMENT", "REVIEW", "ROLES", "CodeCrew", "CrewResult", "code_in"]

#: role -> model: by default the keys are the same
ROLES = {"coder": "coder", "reviewer": "reviewer", "documenter": "documenter"}
REVIEW = "Review this Python code for security flaws:\n\n```python\n{code}\n```"
DOCUMENT = "Write the documentation for this Python function:\n\n```python\n{code}\n```"


@dataclass(frozen=True, slots=True)
class CrewResult(Record):
    """What the crew made of a request, and each agent's turn with its cost."""

    request: str
    code: str
    review: str
    documentation: str
    turns: tuple[DecodeResult, ...]  #: coder, reviewer, documenter


class CodeCrew:
    """Agents `<name>-coder`, `<name>-reviewer`, `<name>-documenter`, registered for the length of the `with` block.

    `models` names a model for each role. Raises AdmissionRefused or ModelError on entry, with nobody left registered.
    """

    def __init__(
        self, conductor: Any = None, *, models: Mapping[str, str] = ROLES, name: str = "crew", max_tokens: int = 400
    ) -> None:
        self._conductor, self._models, self._name = conductor, models, name
        options = Options(max_tokens=max_tokens)
        self._pipeline = Pipeline(
            name="code_crew",
            inputs={"request": None},
            agents={role: Agent(models[role], options=options) for role in ROLES},
            steps={
                "code": Ask("coder", "{request}", keep="code"),
                "review": Ask("reviewer", REVIEW),
                "documentation": Ask("documenter", DOCUMENT),
            },
        )
        self._agents: dict[str, Any] = {}

    def __enter__(self) -> CodeCrew:
        conductor = self._conductor = actors.connect() if self._conductor is None else self._conductor
        with contextlib.ExitStack() as undo:
            undo.callback(self._leave)
            for role in ROLES:
                self._agents[role] = actors.spawn_agent(f"{self._name}-{role}", self._models[role], conductor=conductor)
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        agents, self._agents = self._agents, {}
        ray.get([agent.close.remote() for agent in agents.values()])

    def run(self, request: str, *, on_turn: Callable[[str, DecodeResult], None] = lambda role, result: None) -> CrewResult:
        """Work on one request; `on_turn` hears of each turn as it ends. Raises what the conductor's decode raises."""

        def hear(event: Event) -> None:
            if isinstance(event, TurnEnded) and event.turn.result is not None:
                on_turn(event.turn.agent, event.turn.result)

        done = run(self._pipeline, {"request": request}, conductor=self._conductor, agents=self._agents, on_event=hear)
        for step in done.steps:
            if step.error is not None:
                raise step.error
        code, review, documentation = (step.text or "" for step in done.steps)
        turns = tuple(turn.result for step in done.steps for turn in step.turns if turn.result is not None)
        return CrewResult(request, code, review, documentation, turns)
