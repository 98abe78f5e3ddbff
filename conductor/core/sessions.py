"""Agents as the policy sees them: what they were promised, where their KV is, whether their context is live."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from conductor.core.admission import Tenant
from conductor.core.events import AgentSpec, RequestId, Rung, TurnId
from conductor.errors import InternalError
from conductor.types import AgentId, ContextSpec, KvPlace, ModelId, ReservationId, ServiceClass


class Stage(enum.Enum):
    LOADING = "loading"  #: booked; its model, or its guaranteed context, is not there yet and the registration not answered
    ADMITTED = "admitted"
    LEAVING = "leaving"  #: takes no more turns; goes when its context is closed


class Phase(enum.Enum):
    """A live context's life."""

    OPENING = "opening"
    READY = "ready"
    BUSY = "busy"
    CLOSING = "closing"


#: (phase, what happened) -> phase; a live context begins OPENING, and None is its end
PHASES: dict[tuple[Phase, str], Phase | None] = {
    (Phase.OPENING, "opened"): Phase.READY,
    (Phase.OPENING, "open failed"): None,
    (Phase.READY, "turn began"): Phase.BUSY,
    (Phase.BUSY, "turn ended"): Phase.READY,
    (Phase.READY, "closing"): Phase.CLOSING,
    (Phase.CLOSING, "closed"): None,
}


@dataclass(slots=True)
class LiveContext:
    phase: Phase
    #: the part of the room for turns, or of the agent's guarantee, that this context uses
    reservation: ReservationId
    window: int
    #: the turn it is opened or closed for, or that runs in it
    turn: TurnId | None
    #: CLOSING: its KV goes where room is being made first
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
    #: which rung its context has the next time it is opened
    rung: int = 0
    #: of a guaranteed agent: its own bytes, live or not
    guarantee: ReservationId | None = None
    tokens: int = 0
    #: its KV in host memory or on disk, and, while its context closes, the place booked for it
    saved: SavedKv | None = None
    #: its saved KV is on its way from host memory to disk: what is booked there for it
    moving_to: ReservationId | None = None
    #: what saving the live context's KV would take
    state_bytes: int = 0
    live: LiveContext | None = None
    turns: int = 0
    #: position of its last turn in the order of all turns; the smallest is evicted first
    last_turn: int = 0
    idle_since: float = 0.0
    #: unregister calls to answer when it is gone
    leavers: list[RequestId] = field(default_factory=list)

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

    @property
    def context(self) -> ContextSpec:
        return replace(self.spec.context, window=self.window_in_use)

    @property
    def place(self) -> KvPlace:
        if self.live is not None and self.live.phase is not Phase.OPENING:
            return KvPlace.SLOT
        return self.saved.place if self.saved else KvPlace.TOKENS

    @property
    def phase(self) -> Phase | None:
        return self.live.phase if self.live else None

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
        """Move the live context by the table; its end clears `live`."""
        live = self.live
        if live is None or (live.phase, happened) not in PHASES:
            raise InternalError(f"context of {self.id} is {live.phase.value if live else 'not live'}, yet {happened!r} happened")
        phase = PHASES[live.phase, happened]
        if phase is None:
            self.live = None
        else:
            live.phase = phase


@dataclass(slots=True)
class Turn:
    """A turn that waits or runs, and what has been moved for it so far."""

    id: TurnId
    agent_id: AgentId
    arrived_at: float
    running: bool = False
    #: why it was asked to end after the step that it is in
    stopping: str = ""
    #: stopped, whole, because it outgrew its context: the tokens it needs room for, and those it may need until its end
    outgrew: tuple[int, int] | None = None
    #: it outgrew its context, and the larger one is not booked yet
    unbooked: bool = False
    #: it has waited as long as its caller would: it fails unless what it waits for is under way
    expired: bool = False
    #: what the session held before it
    tokens_before: int = 0
    evicted: AgentId | None = None
    restored: bool = False
    swap_bytes: int = 0
    growths: int = 0
