"""What the state machine asks the shell to do: imperatives, in the order in which they are to be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from conductor.core.estimate import ModelPlan
from conductor.core.events import AgentSpec, RequestId, TurnId
from conductor.errors import ConductorError
from conductor.types import AgentId, ContextSpec, KvPlace, ModelId, ReservationId


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
    """Free the agent's context, its KV saved first if `to` is HOST or DISK; TOKENS drops it."""

    agent_id: AgentId
    to: KvPlace


@dataclass(frozen=True, slots=True)
class MoveKv:
    """Move an agent's saved KV from host memory to disk; KvMoved tells how it went."""

    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class DropKv:
    """Forget an agent's saved KV, at once: it will be recomputed from the tokens."""

    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class RunTurn:
    """Begin the turn, or go on with it after it outgrew its context."""

    turn_id: TurnId
    agent_id: AgentId
    room: int  #: tokens that the live context holds
    evicted: AgentId | None
    restored: bool
    swap_bytes: int
    growths: int


@dataclass(frozen=True, slots=True)
class StopTurn:
    """Ask the running turn to end after the step it is in."""

    turn_id: TurnId


@dataclass(frozen=True, slots=True)
class FailTurn:
    turn_id: TurnId
    error: ConductorError


@dataclass(frozen=True, slots=True)
class DropTurn:
    """A turn that had stopped for want of room goes on no more, at once: the session is as it was before the turn."""

    agent_id: AgentId


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
    LoadModel | UnloadModel | Admit | Refuse | OpenContext | CloseContext | MoveKv | DropKv | RunTurn | StopTurn
    | FailTurn | DropTurn | Forget
    | AnswerUnregister | AnswerReserve | AnswerRelease | FailRequest
)  # fmt: skip
