"""What the state machine asks the shell to do: imperatives, in the order in which they are to be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from conductor.core.estimate import ModelPlan
from conductor.core.events import AgentSpec, RequestId, TurnId
from conductor.errors import ConductorError
from conductor.types import AgentId, ContextSpec, ModelId, ReservationId


@dataclass(frozen=True, slots=True)
class LoadModel:
    model: ModelPlan


@dataclass(frozen=True, slots=True)
class UnloadModel:
    model_id: ModelId


@dataclass(frozen=True, slots=True)
class Admit:
    request_id: RequestId
    agent: AgentSpec
    weights_bytes: int
    context_bytes: int
    charged_bytes: int
    model_loaded: bool


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer a registration with an error; nothing of it remains."""

    request_id: RequestId
    error: ConductorError


@dataclass(frozen=True, slots=True)
class OpenContext:
    """Create the agent's context and restore its KV if host memory has it."""

    agent_id: AgentId
    context: ContextSpec
    model_id: ModelId


@dataclass(frozen=True, slots=True)
class CloseContext:
    """Free the agent's context, its KV saved to host memory first if `save`."""

    agent_id: AgentId
    save: bool


@dataclass(frozen=True, slots=True)
class RunTurn:
    turn_id: TurnId
    agent_id: AgentId
    evicted: AgentId | None
    restored: bool
    swap_bytes: int


@dataclass(frozen=True, slots=True)
class StopTurn:
    """Ask the running turn to end after the step it is in."""

    turn_id: TurnId


@dataclass(frozen=True, slots=True)
class FailTurn:
    turn_id: TurnId
    error: ConductorError


@dataclass(frozen=True, slots=True)
class Forget:
    """The agent has left: its session and its saved KV may go."""

    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class AnswerUnregister:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class AnswerReserve:
    request_id: RequestId
    reservation_id: ReservationId


@dataclass(frozen=True, slots=True)
class AnswerRelease:
    request_id: RequestId
    released_bytes: int


@dataclass(frozen=True, slots=True)
class FailRequest:
    request_id: RequestId
    error: ConductorError


Action: TypeAlias = (
    LoadModel | UnloadModel | Admit | Refuse | OpenContext | CloseContext | RunTurn | StopTurn | FailTurn | Forget
    | AnswerUnregister | AnswerReserve | AnswerRelease | FailRequest
)  # fmt: skip
