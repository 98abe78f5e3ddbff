"""What the state machine asks the shell to do: imperatives, in the order in which they are to be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from conductor.core.estimate import ModelPlan
from conductor.core.events import AgentSpec, RequestId, TurnId
from conductor.core.streaming import Placement
from conductor.errors import ConductorError
from conductor.types import AgentId, ContextSpec, FinishReason, KvPlace, ModelId, PoolId, ReservationId


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Bring weights to the device: all of them as llama.cpp loads them or, with a home in host memory, as they are placed."""

    model: ModelPlan
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class UnloadModel:
    """Take weights off the device. `keep_home`: those at home in host memory stay there."""

    model_id: ModelId
    keep_home: bool = False


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
class OpenPool:
    """Make a live context with slots."""

    pool_id: PoolId
    model_id: ModelId
    context: ContextSpec
    agent_id: AgentId  #: for whom


@dataclass(frozen=True, slots=True)
class ClosePool:
    """Free a pool that nobody sits in."""

    pool_id: PoolId


@dataclass(frozen=True, slots=True)
class TakeSeat:
    """Give the agent a slot of the pool and restore its KV if it is saved."""

    agent_id: AgentId
    pool_id: PoolId


@dataclass(frozen=True, slots=True)
class LeaveSeat:
    """Free the agent's slot, its KV saved first if `to` is HOST or DISK; TOKENS drops it."""

    agent_id: AgentId
    to: KvPlace


@dataclass(frozen=True, slots=True)
class MoveKv:
    """Move an agent's saved KV from host memory to disk; KvMoved tells how it went."""

    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class CopyKv:
    """Clone the conversation of `source` for `new`, its KV to host memory if `to` is HOST; KvCopied tells how it went."""

    turn_id: TurnId
    source: AgentId
    new: AgentId
    to: KvPlace


@dataclass(frozen=True, slots=True)
class AnswerFork:
    request_id: RequestId
    tokens: int


@dataclass(frozen=True, slots=True)
class DropKv:
    """Forget an agent's saved KV, at once: it will be recomputed from the tokens."""

    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class RunTurn:
    """Begin the turn, or go on with it after it stood still."""

    turn_id: TurnId
    agent_id: AgentId
    room: int  #: tokens that the slot holds
    evicted: AgentId | None
    restored: bool
    swap_bytes: int
    growths: int
    pauses: int


@dataclass(frozen=True, slots=True)
class PauseTurn:
    """Ask the running turn to stand still after the step it is in."""

    turn_id: TurnId
    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class StopTurn:
    """Ask the running turn to end after the step it is in."""

    turn_id: TurnId
    agent_id: AgentId
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class EndTurn:
    """End a turn that does not run, at once, with what it made so far, if it began."""

    turn_id: TurnId
    agent_id: AgentId
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class FailTurn:
    turn_id: TurnId
    error: ConductorError


@dataclass(frozen=True, slots=True)
class DropTurn:
    """A turn that stood still goes on no more, at once: the session is as it was before the turn."""

    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class Forget:
    """The agent has left: its session and its saved KV may go."""

    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class AnswerUnregister:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class AnswerCancel:
    request_id: RequestId
    turns: int  #: that end


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
    LoadModel | UnloadModel | Admit | Refuse | OpenPool | ClosePool | TakeSeat | LeaveSeat | MoveKv | CopyKv | DropKv
    | RunTurn | PauseTurn | StopTurn | EndTurn | FailTurn | DropTurn | Forget
    | AnswerUnregister | AnswerCancel | AnswerFork | AnswerReserve | AnswerRelease | FailRequest
)  # fmt: skip
