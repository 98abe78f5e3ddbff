"""Moments for `plan_turns` and `plan_eviction`, in few words: who waits, which pools are live, who sits there, where weights are.

A pool of n slots takes n times what it takes with one, so that a story's numbers add up in the head. Pools are named as their
models, those of guaranteed agents as the agents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from conductor.core.events import TurnId
from conductor.core.moment import (
    Drain,
    Leave,
    LivePool,
    Load,
    Open,
    Park,
    Pause,
    Picture,
    Prospect,
    Sitter,
    Start,
    Step,
    Take,
    WaitingTurn,
    Weights,
)
from conductor.core.placing import offers
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Phase
from conductor.core.streaming import Blocks, Placement
from conductor.core.turns import plan_turns
from conductor.types import AgentId, ModelId, ModelState, PoolId

#: so much room that bytes decide nothing
PLENTY = 10**12
#: of a movable model: a head and nine layers of 10 bytes each, over a link of 10 a second. R layers and a ring of two slots take
#: 30 + 10 R bytes, as far as R = 6, and make a token in 9 - R seconds; all of it takes 100, and a token `step_s`
TENTHS = Blocks(10, (10,) * 9)
WHOLE = Placement(9, 0)


@dataclass(frozen=True)
class Place:
    """A pool and who sits in it."""

    pool: LivePool
    sitters: tuple[Sitter, ...]


def shapes(bytes: int, slots: int) -> tuple[tuple[int, int], ...]:
    return tuple((n, n * bytes) for n in range(1, slots + 1))


# --- who waits --------------------------------------------------------------------------------------------------------


def turn(
    id: int,
    agent: str,
    model: str,
    *,
    bytes: int = 0,
    slots: int = 1,
    window: int = 0,
    tokens: int = 0,
    priority: float = 0,
    served: int = 0,
    blocked: bool = False,
    pool: str = "",
) -> WaitingTurn:
    """`bytes` of a pool with one slot, which may have up to `slots`. `pool`: its name, if not the model's."""
    return WaitingTurn(
        id=TurnId(id),
        agent_id=AgentId(agent),
        model_id=ModelId(model),
        pool=PoolId(pool or model),
        shapes=shapes(bytes, slots),
        window=window,
        tokens=tokens,
        rank=(-priority, served),
        blocked=blocked,
    )


# --- who sits where -----------------------------------------------------------------------------------------------------


def sits(agent: str, phase: Phase = Phase.READY, *, last_turn: int = 0, best_effort: bool = False) -> Sitter:
    return Sitter(AgentId(agent), PoolId(""), phase, last_turn, best_effort)


def runs(
    id: int,
    agent: str,
    *,
    priority: float = 0,
    served: int = 0,
    may_pause: bool = True,
    pausing: bool = False,
    last_turn: int = 0,
    best_effort: bool = False,
) -> Sitter:
    return Sitter(
        AgentId(agent), PoolId(""), Phase.BUSY, last_turn, best_effort, TurnId(id), (-priority, served), may_pause, pausing
    )


def pool(
    model: str,
    *sitters: Sitter,
    phase: PoolPhase = PoolPhase.READY,
    bytes: int = 0,
    window: int = 0,
    slots: int = 1,
    up_to: int = 0,
    settled: bool = True,
    guaranteed: bool = False,
    name: str = "",
) -> Place:
    """`bytes` of one slot; `up_to` so many slots could have been made."""
    name = sitters[0].agent_id if guaranteed else name or model
    made = LivePool(
        PoolId(name), ModelId(model), phase, bytes * slots, window, slots, shapes(bytes, max(slots, up_to)), guaranteed, settled
    )
    return Place(made, tuple(replace(sitter, pool=made.id) for sitter in sitters))


def live(
    agent: str,
    model: str,
    phase: Phase = Phase.READY,
    *,
    last_turn: int = 0,
    bytes: int = 0,
    window: int = 0,
    best_effort: bool = False,
    guaranteed: bool = False,
) -> Place:
    """A pool of one slot. Whoever is busy in it began just now."""
    sitter = sits(agent, phase, last_turn=last_turn, best_effort=best_effort)
    return pool(model, sitter, bytes=bytes, window=window, guaranteed=guaranteed)


def opening(model: str, *, bytes: int = 0, slots: int = 1) -> Place:
    return pool(model, phase=PoolPhase.OPENING, bytes=bytes, slots=slots)


def closing(model: str, *, bytes: int = 0) -> Place:
    return pool(model, phase=PoolPhase.CLOSING, bytes=bytes)


# --- where weights are --------------------------------------------------------------------------------------------------


def firm(model: str, state: ModelState = ModelState.RESIDENT, *, bytes: int = 100) -> Weights:
    """Weights that stay on the device."""
    return Weights(ModelId(model), state, bytes)


def loose(model: str, state: ModelState = ModelState.RESIDENT, *, bytes: int = 100, last_turn: int = 0) -> Weights:
    """Weights in the room for turns: only best-effort agents use them."""
    return Weights(ModelId(model), state, bytes, firm=False, last_turn=last_turn)


def movable(
    model: str,
    state: ModelState = ModelState.PARKED,
    *,
    placed: Placement | None = None,
    last_turn: int = 0,
    step_s: float = 0.1,
) -> Weights:
    """Loose ones with a home in host memory, of `TENTHS`; on the device as they are `placed`, if they are."""
    if placed is not None and state is ModelState.PARKED:
        state = ModelState.RESIDENT
    offered = offers(TENTHS, link_bytes_per_s=10)
    takes = {offer.placement: offer.bytes for offer in offered}
    return Weights(ModelId(model), state, takes[placed or WHOLE], False, last_turn, offered, placed, step_s)


# --- steps --------------------------------------------------------------------------------------------------------------


def start(id: int, agent: str) -> Start:
    return Start(TurnId(id), AgentId(agent))


def take(id: int, agent: str) -> Take:
    return Take(TurnId(id), AgentId(agent))


def leave(agent: str, *, for_turn: int | None) -> Leave:
    return Leave(AgentId(agent), None if for_turn is None else TurnId(for_turn))


def pause(id: int) -> Pause:
    return Pause(TurnId(id))


def open_(turn: WaitingTurn, *, slots: int = 1, window_of: WaitingTurn | None = None) -> Open:
    """For the turn, with the window of another one that waits for the same pool, if given."""
    made_for = window_of or turn
    return Open(turn.id, turn.agent_id, made_for.window, slots, made_for.shapes)


def drain(pool: str, *, for_turn: int | None) -> Drain:
    return Drain(PoolId(pool), None if for_turn is None else TurnId(for_turn))


def load(model: str, placement: Placement | None = None) -> Load:
    return Load(ModelId(model), placement)


def park(model: str) -> Park:
    return Park(ModelId(model))


# --- plans --------------------------------------------------------------------------------------------------------------


def picture(
    waiting: Iterable[WaitingTurn],
    places: Sequence[Place],
    models: Iterable[Weights] = (),
    *,
    live_contexts: float = 1,
    room: int = PLENTY,
    prospects: Mapping[str, Prospect] | None = None,
) -> Picture:
    """Models that are not mentioned stay on the device; agents that are not mentioned are not there."""
    named = {it.model_id: it for it in models}
    used = [*(it.model_id for it in waiting), *(place.pool.model_id for place in places)]
    agents = {(it.pool, it.agent_id) for it in waiting} | {(it.pool, it.agent_id) for place in places for it in place.sitters}
    known = {id: Prospect(sum(pool == id for pool, _ in agents)) for id, _ in agents}
    return Picture(
        sitters=[sitter for place in places for sitter in place.sitters],
        pools={place.pool.id: place.pool for place in places},
        models={id: named.get(id, firm(id)) for id in (*used, *named)},
        room_bytes=room,
        live_contexts=live_contexts,
        prospects=known | {PoolId(id): prospect for id, prospect in (prospects or {}).items()},
    )


def plan(
    waiting: list[WaitingTurn],
    places: Sequence[Place],
    models: Iterable[Weights] = (),
    *,
    live_contexts: float = 1,
    room: int = PLENTY,
    prospects: Mapping[str, Prospect] | None = None,
) -> list[Step]:
    moment = picture(waiting, places, models, live_contexts=live_contexts, room=room, prospects=prospects)
    return plan_turns(waiting, moment)
