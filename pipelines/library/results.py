"""What became of a run: of each turn, each step and the whole; and what is told while it goes on.

Errors are kept as they were raised, with their fields; in JSON they are their class and their message.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

from conductor.errors import ConductorError
from conductor.types import JSON, Admission, DecodeResult, FinishReason, Record


class StepState(str, enum.Enum):
    """How a step ended."""

    DONE = "done"  #: it has its text
    FAILED = "failed"  #: it has an error
    SKIPPED = "skipped"  #: its condition did not hold, or what it works on was skipped
    BLOCKED = "blocked"  #: a step that it needs has failed
    CANCELLED = "cancelled"  #: the run was, before it was done


#: a step that ended so is as it should be
GOOD = (StepState.DONE, StepState.SKIPPED)


@dataclass(frozen=True, slots=True)
class Cost(Record):
    """Of one turn or of several together."""

    turns: int
    prompt_tokens: int  #: decoded
    reused_tokens: int  #: of prompts, held already or copied from another agent
    generated_tokens: int
    queue_ms: float  #: waiting for a seat
    swap_bytes: int
    decode_ms: float  #: from arrival to last token, queue included; turns side by side count each

    @classmethod
    def of(cls, results: Iterable[DecodeResult]) -> Cost:
        all = tuple(results)
        return cls(
            turns=len(all),
            prompt_tokens=sum(r.prompt_tokens for r in all),
            reused_tokens=sum(r.prompt_tokens_reused + r.prefix_tokens_reused for r in all),
            generated_tokens=sum(r.generated_tokens for r in all),
            queue_ms=sum(r.queue_ms for r in all),
            swap_bytes=sum(r.swap_bytes for r in all),
            decode_ms=sum(r.elapsed_ms for r in all),
        )


@dataclass(frozen=True, slots=True)
class Turn(Record):
    """What an agent was asked, and what came of it: a result or an error."""

    agent: str  #: as the pipeline calls it
    prompt: str
    result: DecodeResult | None
    error: ConductorError | None = None

    @property
    def cancelled(self) -> bool:
        """It ended early, because somebody asked for it."""
        return self.result is not None and self.result.finish_reason is FinishReason.CANCELLED

    def to_json(self) -> dict[str, JSON]:
        return _with_error(self, agent=self.agent, prompt=self.prompt, result=self.result and self.result.to_json())


@dataclass(frozen=True, slots=True)
class StepResult(Record):
    """What became of a step."""

    step: str  #: its name
    kind: str  #: ask, fan_out, debate or map
    state: StepState
    text: str | None = None  #: what other steps see
    answers: tuple[str | None, ...] = ()  #: of a map or a fan-out, in the order of the items or agents; None of one that failed
    turns: tuple[Turn, ...] = ()
    elapsed_ms: float = 0.0
    note: str = ""  #: for people: why it was skipped, how a vote went
    error: ConductorError | None = None

    @property
    def cost(self) -> Cost:
        """Of its turns together."""
        return Cost.of(turn.result for turn in self.turns if turn.result is not None)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why its last turn ended."""
        ended = [turn.result.finish_reason for turn in self.turns if turn.result is not None]
        return ended[-1] if ended else None

    def to_json(self) -> dict[str, JSON]:
        return _with_error(
            self, step=self.step, kind=self.kind, state=self.state.value, text=self.text, answers=list(self.answers),
            finish_reason=self.finish_reason and self.finish_reason.value, cost=self.cost.to_json(),
            elapsed_ms=self.elapsed_ms, note=self.note, turns=[turn.to_json() for turn in self.turns],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunResult(Record):
    """What became of a run."""

    pipeline: str  #: its name
    text: str | None  #: of the step that is the pipeline's result; None if that has none
    steps: tuple[StepResult, ...]  #: in the order of the pipeline
    elapsed_ms: float

    @property
    def ok(self) -> bool:
        """Every step was done, or skipped as it should be."""
        return all(step.state in GOOD for step in self.steps)

    @property
    def cost(self) -> Cost:
        """Of all its turns together."""
        return Cost.of(turn.result for step in self.steps for turn in step.turns if turn.result is not None)

    def step(self, name: str) -> StepResult:
        """KeyError for a name that is no step."""
        return {step.step: step for step in self.steps}[name]

    def to_json(self) -> dict[str, JSON]:
        return {
            "pipeline": self.pipeline, "ok": self.ok, "text": self.text, "elapsed_ms": self.elapsed_ms,
            "cost": self.cost.to_json(), "steps": [step.to_json() for step in self.steps],
        }  # fmt: skip


def _with_error(of: Turn | StepResult, **fields: Any) -> dict[str, JSON]:
    error: JSON = None if of.error is None else {"error": type(of.error).__name__, "message": str(of.error)}
    return {**fields, "error": error}


# --- what is told while it goes on --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AgentAdmitted(Record):
    """An agent was registered for the run."""

    agent: str
    admission: Admission


@dataclass(frozen=True, slots=True)
class AgentFailed(Record):
    """It was not admitted, or is not registered: the steps that ask it will fail."""

    agent: str
    error: ConductorError


@dataclass(frozen=True, slots=True)
class StepBegan(Record):
    """What a step needs is there, and it asks its agents now."""

    step: str


@dataclass(frozen=True, slots=True)
class TurnEnded(Record):
    """One of a step's turns ended, well or not."""

    step: str
    turn: Turn


@dataclass(frozen=True, slots=True)
class StepEnded(Record):
    """A step ended, or was not to be done."""

    result: StepResult


#: what `on_event` hears
Event: TypeAlias = "AgentAdmitted | AgentFailed | StepBegan | TurnEnded | StepEnded"
