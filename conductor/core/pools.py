"""Pools: live contexts with slots, and their lives as a table. A missing entry is the error."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from conductor.core.events import TurnId
from conductor.errors import InternalError
from conductor.types import AgentId, ContextSpec, ModelId, PoolId, ReservationId


class PoolPhase(enum.Enum):
    OPENING = "opening"
    READY = "ready"
    DRAINING = "draining"  #: nobody starts or sits down in it any more; it closes when the last one has left
    CLOSING = "closing"


#: (phase, what happened) -> phase; a pool begins OPENING, and None is its end
POOL_PHASES: dict[tuple[PoolPhase, str], PoolPhase | None] = {
    (PoolPhase.OPENING, "opened"): PoolPhase.READY,
    (PoolPhase.OPENING, "open failed"): None,
    (PoolPhase.READY, "drain"): PoolPhase.DRAINING,
    (PoolPhase.DRAINING, "close"): PoolPhase.CLOSING,
    (PoolPhase.CLOSING, "closed"): None,
}


@dataclass(slots=True)
class Pool:
    """Who sits in it is derived from the agents."""

    id: PoolId
    model_id: ModelId
    #: of a guaranteed agent alone; None: of all others of the model
    owner: AgentId | None
    context: ContextSpec
    #: (slots, bytes) of pools with the same window
    shapes: tuple[tuple[int, int], ...]
    #: the part of the room for turns, or of its owner's guarantee, that it uses
    reservation: ReservationId
    #: the turn that it is made or emptied for
    turn: TurnId | None
    #: for whom it is made
    agent_id: AgentId
    phase: PoolPhase = PoolPhase.OPENING
    #: when it became ready
    ready_since: float = 0.0

    def become(self, happened: str) -> bool:
        """Move by the table; False if that was its end."""
        if (self.phase, happened) not in POOL_PHASES:
            raise InternalError(f"{self.id} is {self.phase.value}, yet {happened!r} happened")
        phase = POOL_PHASES[self.phase, happened]
        if phase is not None:
            self.phase = phase
        return phase is not None
