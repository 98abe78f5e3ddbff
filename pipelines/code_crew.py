"""Three agents at work: a coder writes a function, then a reviewer and a documenter work on it at the same time.

    with CodeCrew() as crew:
        print(crew.run("Write a Python function `is_prime(n)` that checks whether a number is prime.").code)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray

import actors
from actors.connection import own
from conductor.errors import ConductorError
from conductor.types import DecodeResult, Record

#: role -> model: by default the keys are the same
ROLES = {"coder": "coder", "reviewer": "reviewer", "documenter": "documenter"}
_REVIEW = "Review this Python code for security flaws:\n\n```python\n{code}\n```"
DOCUMENT = "Write the documentation for this Python function:\n\n```python\n{code}\n```"
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


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
        self._conductor, self._models, self._name, self._max_tokens = conductor, models, name, max_tokens
        self._agents: dict[str, Any] = {}

    def __enter__(self) -> CodeCrew:
        conductor = actors.connect() if self._conductor is None else self._conductor
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
        written = self._finish(self._ask("coder", request))
        on_turn("coder", written)
        code = code_in(written.text)
        working = {self._ask("reviewer", _REVIEW.format(code=code)): "reviewer",
                   self._ask("documenter", DOCUMENT.format(code=code)): "documenter"}  # fmt: skip
        done: dict[str, DecodeResult] = {}
        while working:
            (reference,), _ = ray.wait(list(working))
            role = working.pop(reference)
            done[role] = self._finish(reference)
            on_turn(role, done[role])
        review, documentation = done["reviewer"], done["documenter"]
        return CrewResult(request, code, review.text, documentation.text, (written, review, documentation))

    def _ask(self, role: str, text: str) -> Any:
        return self._agents[role].ask.remote(text, fresh=True, max_tokens=self._max_tokens)

    def _finish(self, reference: Any) -> DecodeResult:
        try:
            result: DecodeResult = ray.get(reference)
        except ConductorError as error:
            raise own(error) from None
        return result


def code_in(text: str) -> str:
    """The first fenced block of an answer, or all of it if there is none."""
    fenced = _FENCE.search(text)
    return (fenced[1] if fenced else text).strip()
