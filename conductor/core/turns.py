"""Whose turn is next, and what has to leave the device for it: a pure decision over a picture of the moment.

Turns come in order of precedence. For each waiting turn:

1. its agent's context is ready and large enough: start it;
2. its agent's context is ready and too small: close it, to be opened larger;
3. its agent's context is on its way, in or out, or busy: wait;
4. one live context for each model: an earlier turn of the same model goes first, and another agent's context of it that is
   live must close first;
5. it would not fit even if all others left (strangers took the room): wait, without holding anybody up;
6. its model's weights are on their way: wait for them, with the room that the context needs kept for it;
7. a place and the bytes are free: load the weights if they are parked, else open;
8. places or bytes are becoming free: wait for them;
9. send away what is idle: best-effort agents' contexts and weights first, those used longest ago first among equals;
10. otherwise wait for turns to end. What was freed so far is kept: nobody behind takes it.

Guaranteed agents have contexts of their own, which are always live: they only ever meet rules 1 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from conductor.core.events import TurnId
from conductor.core.sessions import Phase
from conductor.types import AgentId, ModelId, ModelState


@dataclass(frozen=True, slots=True)
class WaitingTurn:
    id: TurnId
    agent_id: AgentId
    model_id: ModelId
    context_bytes: int = 0  #: of the context that it is to have
    window: int = 0  #: the tokens that its context must have room for
    blocked: bool = False  #: it waits for something else; its agent's later turns wait behind it


@dataclass(frozen=True, slots=True)
class Occupant:
    """A live context in the picture. Those of guaranteed agents take no part in the room for turns."""

    agent_id: AgentId
    model_id: ModelId
    phase: Phase
    last_turn: int
    bytes: int = 0
    window: int = 0
    best_effort: bool = False
    guaranteed: bool = False


@dataclass(frozen=True, slots=True)
class Weights:
    """A model in the picture. `bytes`: booked, or what it will take; only those of loose ones are in the room for turns."""

    model_id: ModelId
    state: ModelState
    bytes: int
    firm: bool = True
    last_turn: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    turn_id: TurnId
    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class Open:
    turn_id: TurnId
    agent_id: AgentId


@dataclass(frozen=True, slots=True)
class Close:
    agent_id: AgentId
    for_turn: TurnId | None


@dataclass(frozen=True, slots=True)
class Load:
    model_id: ModelId


@dataclass(frozen=True, slots=True)
class Park:
    model_id: ModelId


Step: TypeAlias = Start | Open | Close | Load | Park


def plan_turns(
    waiting: Sequence[WaitingTurn],
    occupants: Sequence[Occupant],
    models: Mapping[ModelId, Weights],
    *,
    live_contexts: int,
    room_bytes: int,
) -> list[Step]:
    """The steps to take now, `waiting` being in order of precedence. The numbers are those of the module's list."""
    plan = _Plan(occupants, models, live_contexts=live_contexts, room_bytes=room_bytes)
    served: set[AgentId] = set()
    for turn in waiting:
        if turn.agent_id not in served:
            served.add(turn.agent_id)
            if not turn.blocked:
                plan.serve(turn)
    return plan.steps


def plan_eviction(
    occupants: Sequence[Occupant], models: Mapping[ModelId, Weights], *, bytes: int, last: frozenset[AgentId] = frozenset()
) -> list[Step]:
    """Send idle contexts and weights away until so many bytes are on their way out; the contexts of `last` only if need be."""
    plan = _Plan(occupants, models, live_contexts=len(occupants), room_bytes=0)
    plan.evict(bytes - plan.coming_bytes, for_turn=None, last=last)
    return plan.steps


@dataclass(slots=True)
class _Plan:
    """Places and bytes of the room for turns as the plan is made; a promise to an earlier turn is taken off at once."""

    occupants: Sequence[Occupant]
    models: Mapping[ModelId, Weights]
    live_contexts: int
    room_bytes: int
    steps: list[Step] = field(default_factory=list)
    ready: dict[AgentId, Occupant] = field(init=False)
    idle_weights: dict[ModelId, Weights] = field(init=False)
    free_bytes: int = field(init=False)
    coming_bytes: int = field(init=False)
    free_places: int = field(init=False)
    coming_places: int = field(init=False)
    #: weights that will be idle once the ready context above them is gone
    under_ready: dict[ModelId, Weights] = field(init=False)
    claimed: set[ModelId] = field(default_factory=set)

    def __post_init__(self) -> None:
        turning = [occupant for occupant in self.occupants if not occupant.guaranteed]
        loose = [w for w in self.models.values() if not w.firm and w.state is not ModelState.PARKED]
        closing = [occupant for occupant in turning if occupant.phase is Phase.CLOSING]
        busy_models = {occupant.model_id for occupant in turning}
        self.ready = {occupant.agent_id: occupant for occupant in turning if occupant.phase is Phase.READY}
        self.idle_weights = {w.model_id: w for w in loose if w.state is ModelState.RESIDENT and w.model_id not in busy_models}
        ready_models = {occupant.model_id for occupant in self.ready.values()}
        self.under_ready = {w.model_id: w for w in loose if w.state is ModelState.RESIDENT and w.model_id in ready_models}
        self.free_bytes = self.room_bytes - sum(o.bytes for o in turning) - sum(w.bytes for w in loose)
        self.coming_bytes = sum(o.bytes for o in closing) + sum(w.bytes for w in loose if w.state is ModelState.UNLOADING)
        self.free_places = self.live_contexts - len(turning)
        self.coming_places = len(closing)

    def serve(self, turn: WaitingTurn) -> None:
        own = next((occupant for occupant in self.occupants if occupant.agent_id == turn.agent_id), None)
        if own is not None:
            self._use(own, turn)
            return
        model = self.models[turn.model_id]
        alone = turn.context_bytes + (0 if model.firm else model.bytes)
        if turn.model_id in self.claimed or alone > self.room_bytes:  # (4), (5)
            return
        self.claimed.add(turn.model_id)
        rival = next((o for o in self.occupants if o.model_id == turn.model_id and not o.guaranteed), None)
        if rival is None:
            self._make_live(turn, place_comes=False)
            return
        if rival.agent_id in self.ready:  # (4)
            self._close(rival, turn.id)
        elif rival.phase is not Phase.CLOSING:  # (4)
            return
        self._make_live(turn, place_comes=True)

    def _use(self, own: Occupant, turn: WaitingTurn) -> None:
        if own.agent_id not in self.ready and not (own.guaranteed and own.phase is Phase.READY):  # (3)
            return
        self.ready.pop(own.agent_id, None)
        if own.guaranteed or own.window >= turn.window:  # (1)
            self.steps.append(Start(turn.id, turn.agent_id))
        else:  # (2)
            self.claimed.add(turn.model_id)
            self._close(own, turn.id)
            self._make_live(turn, place_comes=True)

    def _make_live(self, turn: WaitingTurn, *, place_comes: bool) -> None:
        """Load, open, or see to it that there will be room. `place_comes`: the place for this turn is being cleared already."""
        model, needed = self.models[turn.model_id], self._needs(turn)
        self.idle_weights.pop(turn.model_id, None)
        self.under_ready.pop(turn.model_id, None)
        if place_comes:
            self.coming_places -= 1
        has_place = not place_comes and self._find_place(turn)
        has_bytes = needed <= self.free_bytes
        if not has_bytes:  # (8), (9)
            self.evict(needed - self.free_bytes - self.coming_bytes, for_turn=turn.id)
        self.free_bytes -= needed  # (6), (10)
        if has_bytes and model.state is ModelState.PARKED:  # (7)
            self.steps.append(Load(turn.model_id))
        elif has_bytes and has_place and model.state is ModelState.RESIDENT:  # (7)
            self.steps.append(Open(turn.id, turn.agent_id))

    def _needs(self, turn: WaitingTurn) -> int:
        """Bytes of the room for turns that the turn will take, beyond what its model has of it already."""
        model = self.models[turn.model_id]
        absent = model.state in (ModelState.PARKED, ModelState.UNLOADING)
        return turn.context_bytes + (model.bytes if absent else 0)

    def _find_place(self, turn: WaitingTurn) -> bool:
        """Whether one of the live contexts' places is free now; if not, one is waited for or cleared."""
        if self.free_places > 0:
            self.free_places -= 1
            return True
        if self.coming_places > 0:  # (8)
            self.coming_places -= 1
        elif self.ready:  # (9)
            self._close(min(self.ready.values(), key=_gives_way), turn.id)
            self.coming_places -= 1
        return False

    def _close(self, occupant: Occupant, for_turn: TurnId | None) -> None:
        self.ready.pop(occupant.agent_id, None)
        self.steps.append(Close(occupant.agent_id, for_turn))
        self.coming_bytes += occupant.bytes
        self.coming_places += 1

    def evict(self, bytes: int, *, for_turn: TurnId | None, last: frozenset[AgentId] = frozenset()) -> None:
        """Close and park what is idle, no more than brings `bytes`; the contexts of `last` only if need be."""
        idle: list[Occupant | Weights] = [*self.ready.values(), *self.idle_weights.values()]
        idle.sort(key=lambda it: (isinstance(it, Occupant) and it.agent_id in last, *_gives_way(it)))
        for it in idle:
            if bytes <= 0:
                return
            bytes -= it.bytes
            if isinstance(it, Occupant):
                if weights := self.under_ready.pop(it.model_id, None):  # they are parked when the context is closed
                    bytes -= weights.bytes
                self._close(it, for_turn)
            else:
                del self.idle_weights[it.model_id]
                self.steps.append(Park(it.model_id))
                self.coming_bytes += it.bytes


def _gives_way(idle: Occupant | Weights) -> tuple[bool, int]:
    """Best-effort agents' first, then those used longest ago. Weights leave only where best-effort agents alone use them."""
    return isinstance(idle, Occupant) and not idle.best_effort, idle.last_turn
