"""Agents as the policy sees them: what they were promised, where their KV is, whether they have a seat in a pool."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from conductor.core.admission import Tenant
from conductor.core.events import AgentSpec, RequestId, Rung, TurnId
from conductor.errors import InternalError
from conductor.types import AgentId, ContextSpec, FinishReason, KvPlace, ModelId, PoolId, ReservationId, ServiceClass


class Stage(enum.Enum):
    LOADING = "loading"  #: booked; its model, or its guaranteed pool, is not there yet and the registration not answered
    ADMITTED = "admitted"
    LEAVING = "leaving"  #: takes no more turns; goes when it has left its seat


class Phase(enum.Enum):
    """How an agent sits in its pool."""

    TAKING = "taking"  #: the slot is its own, its KV on the way in
    READY = "ready"
    BUSY = "busy"
    LEAVING = "leaving"  #: its KV on the way out


#: (phase, what happened) -> phase; a seat begins TAKING, and None is its end
PHASES: dict[tuple[Phase, str], Phase | None] = {
    (Phase.TAKING, "taken"): Phase.READY,
    (Phase.TAKING, "not taken"): None,
    (Phase.READY, "turn began"): Phase.BUSY,
    (Phase.BUSY, "turn ended"): Phase.READY,
    (Phase.READY, "leaving"): Phase.LEAVING,
    (Phase.LEAVING, "left"): None,
}


@dataclass(slots=True)
class Seat:
    """An agent's slot of a pool."""

    pool: PoolId
    phase: Phase
    #: the turn that it is taken or left for, or that runs in it
    turn: TurnId | None
    #: LEAVING: its KV goes where room is being made first
    awaits_host_room: bool = False


@dataclass(frozen=True, slots=True)
class SavedKv:
    place: KvPlace  #: HOST or DISK
    reservation: ReservationId


@dataclass(slots=True)
class Agent:
    spec: AgentSpec
    registration: RequestId
    charged_bytes: int
    ladder: list[Rung]  #: the spec's, with bytes as measured where one like it was
    loads_model: bool
    stage: Stage = Stage.LOADING
    #: the window that it needs: a pool that is made for it has this one
    rung: int = 0
    #: of a guaranteed agent: its own bytes, its pool open or not
    guarantee: ReservationId | None = None
    tokens: int = 0
    #: its KV in host memory or on disk, and, while it leaves its seat, the place booked for it
    saved: SavedKv | None = None
    #: its saved KV is on its way from host memory to disk: what is booked there for it
    moving_to: ReservationId | None = None
    #: its conversation is being cloned, or it is the clone: it stays as it is until that is done
    cloning: bool = False
    #: what saving the KV in its seat would take
    state_bytes: int = 0
    seat: Seat | None = None
    turns: int = 0
    #: position of its last turn in the order of all turns; the smallest is evicted first
    last_turn: int = 0
    #: tokens computed for it, in the account of fair shares
    served: int = 0
    idle_since: float = 0.0
    #: unregister calls to answer when it is gone
    leavers: list[RequestId] = field(default_factory=list)
    #: where it sits when it sits
    pool: PoolId = field(init=False)

    def __post_init__(self) -> None:
        self.pool = _pool(self.spec)

    @property
    def id(self) -> AgentId:
        return self.spec.id

    @property
    def model_id(self) -> ModelId:
        return self.spec.model.id

    @property
    def service_class(self) -> ServiceClass:
        return self.spec.service_class

    @property
    def guaranteed(self) -> bool:
        return self.service_class is ServiceClass.GUARANTEED

    @property
    def window_in_use(self) -> int:
        return self.ladder[self.rung].window

    @property
    def context_bytes(self) -> int:
        """What its context takes at the window in use."""
        return self.ladder[self.rung].context_bytes

    def pool_context(self, window: int, slots: int) -> ContextSpec:
        return replace(self.spec.context, window=window, slots=slots)

    @property
    def place(self) -> KvPlace:
        if self.phase not in (None, Phase.TAKING):
            return KvPlace.SLOT
        return self.saved.place if self.saved else KvPlace.TOKENS

    @property
    def phase(self) -> Phase | None:
        return self.seat.phase if self.seat else None

    @property
    def in_motion(self) -> bool:
        """Its KV is being moved or copied: nothing else may happen to it meanwhile."""
        return self.cloning or self.moving_to is not None

    def tenant(self, weights_bytes: int) -> Tenant:
        return Tenant(self.service_class, self.model_id, weights_bytes, self.context_bytes)

    def rung_for(self, tokens: int) -> int:
        """The smallest rung with room for so many; the last if none has."""
        return next((i for i, rung in enumerate(self.ladder) if rung.window >= tokens), len(self.ladder) - 1)

    def settle(self) -> None:
        """Go back to the cheapest window that its conversation fits in: never dearer than the one that it was made in."""
        if not self.guaranteed:
            rungs = range(self.rung_for(self.tokens), len(self.ladder))
            self.rung = min(rungs, key=lambda rung: self.ladder[rung].context_bytes)

    def become(self, happened: str) -> None:
        """Move the seat by the table; its end clears `seat`."""
        seat = self.seat
        if seat is None or (seat.phase, happened) not in PHASES:
            raise InternalError(f"the seat of {self.id} is {seat.phase.value if seat else 'none'}, yet {happened!r} happened")
        phase = PHASES[seat.phase, happened]
        if phase is None:
            self.seat = None
        else:
            seat.phase = phase


def _pool(spec: AgentSpec) -> PoolId:
    """With the other agents whose KV has the same layout, or alone if it is guaranteed."""
    if spec.service_class is ServiceClass.GUARANTEED:
        return PoolId(f"agent:{spec.id}")
    context, border = spec.context, spec.model.geometry.rotation_changes_at
    layout = (context.kv_type, context.flash_attention, context.n_batch, context.n_ubatch, context.window > border > 0)
    return PoolId(f"model:{spec.model.id}:{','.join(map(str, layout))}")


@dataclass(frozen=True, slots=True)
class Fork:
    """Whose conversation begins where the agent's is, and who asked for it."""

    new: AgentId
    request_id: RequestId


@dataclass(slots=True)
class Turn:
    """A turn that waits, runs or stands still, and what has been moved for it so far."""

    id: TurnId
    agent_id: AgentId
    arrived_at: float
    #: since when it waits, or runs
    since: float
    running: bool = False
    #: it began and was stopped whole: it goes on where it was
    stands_still: bool = False
    #: why it was asked to end after the step that it is in
    stopping: FinishReason | None = None
    #: it was asked to stand still after the step that it is in
    pausing: bool = False
    #: its reader does not keep up: it makes no tokens
    held: bool = False
    #: stopped because it outgrew its pool: the tokens it needs room for, and those it may need until its end
    outgrew: tuple[int, int] | None = None
    #: it outgrew its pool, and the larger window is not booked yet
    unbooked: bool = False
    #: it has waited as long as its caller would: it fails unless what it waits for is under way
    expired: bool = False
    #: what the session held before it
    tokens_before: int = 0
    #: it has made tokens, which stay whatever becomes of it
    has_made: bool = False
    #: tokens computed for it that its agent's account has
    counted: int = 0
    evicted: AgentId | None = None
    restored: bool = False
    swap_bytes: int = 0
    growths: int = 0
    pauses: int = 0
    #: it is no turn but waits like one: the agent's conversation is to be cloned
    fork: Fork | None = None
