"""What the state machine hears, in the past tense.

The shell turns calls and results into events, `State.handle` answers with `actions`, the shell carries them out, and
each outcome is the next event. Plain values only: a test needs nothing else to tell a story.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType, TypeAlias

from conductor.core.estimate import ModelPlan
from conductor.errors import ConductorError
from conductor.types import AgentId, ContextSpec, KvPlace, ModelId, OwnerId, PoolId, ReservationId, ServiceClass

TurnId = NewType("TurnId", int)
RequestId = NewType("RequestId", int)


@dataclass(frozen=True, slots=True)
class Rung:
    """A size that an agent's context may have."""

    window: int
    context_bytes: int  #: estimated, of one slot
    #: what a pool of more slots takes, ascending: (slots, bytes)
    wider: tuple[tuple[int, int], ...] = ()

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(slots, bytes) of every pool that may be made with this window."""
        return ((1, self.context_bytes), *self.wider)


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
    weights_bytes: int  #: measured, with the ring that layers stream through
    at_home: bool = False  #: they are in host memory too


@dataclass(frozen=True, slots=True)
class ModelLoadFailed:
    model_id: ModelId
    error: ConductorError
    at_home: bool = False  #: its weights are in host memory all the same
    unmovable: bool = False  #: they do not let themselves be placed


@dataclass(frozen=True, slots=True)
class ModelUnloaded:
    model_id: ModelId
    step_s: float | None = None  #: what a step's computation took while layers streamed; None if none did


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
class TurnsCancelled:
    """Whoever asked wants the agent's turns to end, with what they made so far."""

    request_id: RequestId
    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class ForkRequested:
    """`new`, who was admitted a moment ago, goes on from where `source` will be after the turns that it has asked for."""

    request_id: RequestId
    turn_id: TurnId
    source: AgentId
    new: AgentId


@dataclass(frozen=True, slots=True)
class KvCopied:
    """The conversation was cloned, and its KV as far as there was a place for it."""

    turn_id: TurnId
    tokens: int
    place: KvPlace  #: of the copy
    copied_bytes: int


@dataclass(frozen=True, slots=True)
class TurnOverdue:
    """The time that the caller gave the whole turn is up: it ends with what it made."""

    turn_id: TurnId


@dataclass(frozen=True, slots=True)
class TurnHeld:
    """The turn's reader does not keep up, or does again."""

    turn_id: TurnId
    held: bool


@dataclass(frozen=True, slots=True)
class TurnsProgressed:
    """Time has passed while somebody waited. `computed`: tokens of running turns so far, prompts included."""

    computed: Mapping[AgentId, int]


@dataclass(frozen=True, slots=True)
class TurnExpired:
    """The turn has waited as long as its caller would."""

    turn_id: TurnId


@dataclass(frozen=True, slots=True)
class TurnOutgrew:
    """The running turn stopped, whole, because its slot is full: it goes on in a larger one."""

    turn_id: TurnId
    tokens: int  #: the session holds now
    state_bytes: int  #: of its KV, if it were saved now
    required_tokens: int  #: that a slot must have room for, for the turn to go on at all
    desired_tokens: int  #: that it may need until its end
    computed_tokens: int = 0  #: for this turn so far, its prompt included
    has_made: bool = False  #: whether it has generated anything


@dataclass(frozen=True, slots=True)
class TurnPaused:
    """The running turn stopped, whole, because it was asked to: it goes on where it was."""

    turn_id: TurnId
    tokens: int
    state_bytes: int
    computed_tokens: int = 0
    has_made: bool = False


@dataclass(frozen=True, slots=True)
class TurnFinished:
    turn_id: TurnId
    tokens: int  #: the session holds now
    state_bytes: int = 0  #: of its KV, if it were saved now
    prefill_s_per_token: float | None = None  #: how long it takes to read a prompt; None if none was long enough to tell
    computed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PoolOpened:
    pool_id: PoolId
    context_bytes: int | None  #: measured; None where this llama.cpp does not tell


@dataclass(frozen=True, slots=True)
class PoolOpenFailed:
    pool_id: PoolId
    error: ConductorError


@dataclass(frozen=True, slots=True)
class PoolClosed:
    pool_id: PoolId


@dataclass(frozen=True, slots=True)
class SeatTaken:
    agent_id: AgentId
    restored_bytes: int  #: moved back from host memory; 0 for a new or recomputed session


@dataclass(frozen=True, slots=True)
class SeatNotTaken:
    """What was saved of its KV is still there."""

    agent_id: AgentId
    error: ConductorError


@dataclass(frozen=True, slots=True)
class SeatLeft:
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
    | TurnRequested | TurnAbandoned | TurnsCancelled | TurnOverdue | TurnHeld | TurnsProgressed | TurnExpired
    | ForkRequested | KvCopied
    | TurnOutgrew | TurnPaused | TurnFinished | PoolOpened | PoolOpenFailed | PoolClosed | SeatTaken | SeatNotTaken | SeatLeft
    | KvMoved | DeviceRead | Closing | ReserveRequested | ReserveAbandoned | ReleaseRequested
)  # fmt: skip
