"""Agents as the policy sees them: what they were promised, where their KV is, whether their context is live."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from conductor.core.events import AgentSpec, RequestId, TurnId
from conductor.errors import InternalError
from conductor.types import AgentId, KvPlace, ModelId, ReservationId


class Stage(enum.Enum):
    LOADING = "loading"  #: booked; its model is not there yet and the registration not answered
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
    #: the part of the headroom that this context uses
    reservation: ReservationId
    #: the turn it is opened or closed for, or that runs in it
    turn: TurnId | None


@dataclass(slots=True)
class Agent:
    spec: AgentSpec
    registration: RequestId
    charged_bytes: int
    context_bytes: int  #: what its context takes while it is live: estimated, and measured as soon as one like it was
    loads_model: bool
    stage: Stage = Stage.LOADING
    place: KvPlace = KvPlace.TOKENS
    tokens: int = 0
    host_bytes: int = 0
    live: LiveContext | None = None
    turns: int = 0
    #: position of its last turn in the order of all turns; the smallest is evicted first
    last_turn: int = 0
    #: unregister calls to answer when it is gone
    leavers: list[RequestId] = field(default_factory=list)

    @property
    def id(self) -> AgentId:
        return self.spec.id

    @property
    def model_id(self) -> ModelId:
        return self.spec.model.id

    @property
    def phase(self) -> Phase | None:
        return self.live.phase if self.live else None

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
    running: bool = False
    evicted: AgentId | None = None
    restored: bool = False
    swap_bytes: int = 0
