"""What the state machine hears, in the past tense.

The shell turns calls and results into events, `State.handle` answers with `actions`, the shell carries them out, and
each outcome is the next event. Plain values only: a test needs nothing else to tell a story.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType, TypeAlias

from conductor.core.estimate import ModelPlan
from conductor.errors import ConductorError
from conductor.types import AgentId, ContextSpec, KvPlace, ModelId, OwnerId, ReservationId, ServiceClass

TurnId = NewType("TurnId", int)
RequestId = NewType("RequestId", int)


@dataclass(frozen=True, slots=True)
class Rung:
    """A size that an agent's context may have."""

    window: int
    context_bytes: int  #: estimated


@dataclass(frozen=True, slots=True)
class AgentSpec:
    id: AgentId
    model: ModelPlan
    context: ContextSpec  #: of its whole window
    #: the sizes that its context grows through, ascending; the last is the whole window, and a guaranteed agent's only one
    ladder: tuple[Rung, ...]
    service_class: ServiceClass = ServiceClass.SHARED
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
class TurnExpired:
    """The turn has waited as long as its caller would."""

    turn_id: TurnId


@dataclass(frozen=True, slots=True)
class TurnOutgrew:
    """The running turn stopped, whole, because its context is full: it goes on in a larger one."""

    turn_id: TurnId
    tokens: int  #: the session holds now
    state_bytes: int  #: of its KV, if it were saved now
    required_tokens: int  #: that the context must have room for, for the turn to go on at all
    desired_tokens: int  #: that it may need until its end


@dataclass(frozen=True, slots=True)
class TurnFinished:
    turn_id: TurnId
    tokens: int  #: the session holds now
    state_bytes: int = 0  #: of its KV, if it were saved now
    prefill_s_per_token: float | None = None  #: how long it takes to read a prompt; None if none was long enough to tell


@dataclass(frozen=True, slots=True)
class ContextOpened:
    agent_id: AgentId
    context_bytes: int | None  #: measured; None where this llama.cpp does not tell
    restored_bytes: int  #: moved back from host memory; 0 for a new or recomputed session


@dataclass(frozen=True, slots=True)
class ContextOpenFailed:
    """What was saved of its KV is still there."""

    agent_id: AgentId
    error: ConductorError


@dataclass(frozen=True, slots=True)
class ContextClosed:
    agent_id: AgentId
    place: KvPlace  #: where its KV is now; TOKENS if it could not be kept
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class KvMoved:
    """A saved KV went from host memory to disk or, where that failed, nowhere."""

    agent_id: AgentId
    place: KvPlace
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Closing:
    """The conductor ends: nobody is admitted any more, and everybody leaves."""

    error: ConductorError  #: for those who wait


@dataclass(frozen=True, slots=True)
class DeviceRead:
    """What the device says now. Comes with the clock, at every admission, and when memory was given back."""

    cap_bytes: int  #: what may be booked
    physical_bytes: int  #: the device's total, less what the driver and strangers hold


@dataclass(frozen=True, slots=True)
class ReserveRequested:
    request_id: RequestId
    holder: str
    bytes: int
    owner: OwnerId | None = None


@dataclass(frozen=True, slots=True)
class ReserveAbandoned:
    """The caller went away, before the answer or with it on its way."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class ReleaseRequested:
    request_id: RequestId
    reservation_id: ReservationId


Event: TypeAlias = (
    RegisterRequested | RegisterAbandoned | ModelLoaded | ModelLoadFailed | ModelUnloaded | UnregisterRequested | OwnerDied
    | TurnRequested | TurnAbandoned | TurnExpired | TurnOutgrew | TurnFinished | ContextOpened | ContextOpenFailed | ContextClosed
    | KvMoved | DeviceRead | Closing | ReserveRequested | ReserveAbandoned | ReleaseRequested
)  # fmt: skip
