"""What the state machine hears, in the past tense.

The shell turns calls and results into events, `State.handle` answers with `actions`, the shell carries them out, and
each outcome is the next event. Plain values only: a test needs nothing else to tell a story.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType, TypeAlias

from conductor.core.estimate import ModelPlan
from conductor.errors import ConductorError
from conductor.types import AgentId, ContextSpec, KvPlace, ModelId, OwnerId, ReservationId

TurnId = NewType("TurnId", int)
RequestId = NewType("RequestId", int)


@dataclass(frozen=True, slots=True)
class AgentSpec:
    id: AgentId
    model: ModelPlan
    context: ContextSpec
    context_bytes: int  #: estimated
    priority: int = 0
    owner: OwnerId | None = None


@dataclass(frozen=True, slots=True)
class RegisterRequested:
    request_id: RequestId
    agent: AgentSpec
    may_wait: bool = False


@dataclass(frozen=True, slots=True)
class RegisterAbandoned:
    """Before an answer the caller went away, or (`timed_out`) its time was up."""

    request_id: RequestId
    timed_out: bool = False


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    model_id: ModelId
    weights_bytes: int  #: measured


@dataclass(frozen=True, slots=True)
class ModelLoadFailed:
    model_id: ModelId
    error: ConductorError


@dataclass(frozen=True, slots=True)
class ModelUnloaded:
    model_id: ModelId


@dataclass(frozen=True, slots=True)
class UnregisterRequested:
    request_id: RequestId
    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class OwnerDied:
    owner: OwnerId


@dataclass(frozen=True, slots=True)
class TurnRequested:
    turn_id: TurnId
    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class TurnAbandoned:
    """Nobody waits for this turn any more."""

    turn_id: TurnId


@dataclass(frozen=True, slots=True)
class TurnFinished:
    turn_id: TurnId
    tokens: int  #: the session holds now


@dataclass(frozen=True, slots=True)
class ContextOpened:
    agent_id: AgentId
    context_bytes: int  #: measured
    restored_bytes: int  #: moved back from host memory; 0 for a new or recomputed session


@dataclass(frozen=True, slots=True)
class ContextOpenFailed:
    agent_id: AgentId
    error: ConductorError
    place: KvPlace


@dataclass(frozen=True, slots=True)
class ContextClosed:
    agent_id: AgentId
    place: KvPlace
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class ReserveRequested:
    request_id: RequestId
    holder: str
    bytes: int
    owner: OwnerId | None = None


@dataclass(frozen=True, slots=True)
class ReleaseRequested:
    request_id: RequestId
    reservation_id: ReservationId


Event: TypeAlias = (
    RegisterRequested | RegisterAbandoned | ModelLoaded | ModelLoadFailed | ModelUnloaded | UnregisterRequested | OwnerDied
    | TurnRequested | TurnAbandoned | TurnFinished | ContextOpened | ContextOpenFailed | ContextClosed
    | ReserveRequested | ReleaseRequested
)  # fmt: skip
