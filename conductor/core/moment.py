"""What a plan of turns is made from, and the steps that it is made of. Plain values; see `turns` for the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from conductor.core.events import TurnId
from conductor.core.placing import Offer
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Phase
from conductor.core.streaming import Placement
from conductor.types import AgentId, ModelId, ModelState, PoolId

#: (priority, negative; tokens served): the smaller goes first
Rank: TypeAlias = tuple[float, float]
FIRST: Rank = (-math.inf, -math.inf)
LAST: Rank = (math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class WaitingTurn:
    id: TurnId
    agent_id: AgentId
    model_id: ModelId
    pool: PoolId
    shapes: tuple[tuple[int, int], ...] = ((1, 0),)  #: (slots, bytes) of a pool that is made for it, ascending
    window: int = 0  #: of such a pool
    tokens: int = 0  #: that a seat must have room for
    rank: Rank = (0, 0)
    blocked: bool = False  #: it waits for something else; its agent's later turns wait behind it


@dataclass(frozen=True, slots=True)
class Sitter:
    """An agent with a seat. Those of guaranteed agents take no part in the room for turns."""

    agent_id: AgentId
    pool: PoolId
    phase: Phase
    last_turn: int = 0
    best_effort: bool = False
    turn_id: TurnId | None = None  #: that runs
    rank: Rank = (0, 0)  #: of that turn
    may_pause: bool = False  #: that turn ran its minimum
    pausing: bool = False


@dataclass(frozen=True, slots=True)
class LivePool:
    id: PoolId
    model_id: ModelId
    phase: PoolPhase = PoolPhase.READY
    bytes: int = 0
    window: int = 0
    slots: int = 1
    shapes: tuple[tuple[int, int], ...] = ()  #: (slots, bytes) of the same window, ascending
    guaranteed: bool = False
    settled: bool = True  #: it has been ready for the minimum turn


@dataclass(frozen=True, slots=True)
class Prospect:
    """Who may come to a pool, there or not."""

    agents: int
    bytes: int = 0  #: of the least pool that serves each of them, with weights that it would have to load


@dataclass(frozen=True, slots=True)
class Weights:
    """A model in the picture. `bytes`: booked, or what it will take whole; only those of loose ones are in the room for turns."""

    model_id: ModelId
    state: ModelState
    bytes: int
    firm: bool = True
    last_turn: int = 0
    offers: tuple[Offer, ...] = ()  #: how much of it the device may have, the least first; none: all of it or nothing
    placement: Placement | None = None  #: that it has, of those
    step_s: float = 0.0  #: a step's computation

    @property
    def least_bytes(self) -> int:
        return self.offers[0].bytes if self.offers else self.bytes

    @property
    def offer(self) -> Offer | None:
        """The one that it has; loaded from its file, before it had a home, all of it."""
        if not self.offers or self.state is not ModelState.RESIDENT:
            return None
        found = next((offer for offer in self.offers if offer.placement == self.placement), None)
        return found or Offer(self.offers[-1].placement, self.bytes, 0.0)


@dataclass(frozen=True, slots=True)
class Start:
    turn_id: TurnId
    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class Take:
    turn_id: TurnId
    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class Leave:
    agent_id: AgentId
    for_turn: TurnId | None


@dataclass(frozen=True, slots=True)
class Pause:
    turn_id: TurnId


@dataclass(frozen=True, slots=True)
class Open:
    turn_id: TurnId
    agent_id: AgentId
    window: int
    slots: int
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Drain:
    pool: PoolId
    for_turn: TurnId | None


@dataclass(frozen=True, slots=True)
class Load:
    model_id: ModelId
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class Park:
    model_id: ModelId


Step: TypeAlias = Start | Take | Leave | Pause | Open | Drain | Load | Park


@dataclass(frozen=True, slots=True)
class Picture:
    """The moment that a plan is made for."""

    sitters: Sequence[Sitter]
    pools: Mapping[PoolId, LivePool]
    models: Mapping[ModelId, Weights]
    room_bytes: int
    live_contexts: float = math.inf
    prospects: Mapping[PoolId, Prospect] = field(default_factory=dict)
