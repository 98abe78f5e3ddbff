"""Moments for `plan_turns` and `plan_eviction`, in few words: who waits, whose context is live, where weights are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from conductor.core.events import TurnId
from conductor.core.sessions import Phase
from conductor.core.turns import Close, Load, Occupant, Open, Park, Start, Step, WaitingTurn, Weights, plan_turns
from conductor.types import AgentId, ModelId, ModelState

#: so much room that bytes decide nothing
PLENTY = 10**12


def turn(id: int, agent: str, model: str, *, bytes: int = 0, window: int = 0, blocked: bool = False) -> WaitingTurn:
    return WaitingTurn(TurnId(id), AgentId(agent), ModelId(model), bytes, window, blocked)


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
) -> Occupant:
    return Occupant(AgentId(agent), ModelId(model), phase, last_turn, bytes, window, best_effort, guaranteed)


def firm(model: str, state: ModelState = ModelState.RESIDENT, *, bytes: int = 100) -> Weights:
    """Weights that stay on the device."""
    return Weights(ModelId(model), state, bytes)


def loose(model: str, state: ModelState = ModelState.RESIDENT, *, bytes: int = 100, last_turn: int = 0) -> Weights:
    """Weights in the room for turns: only best-effort agents use them."""
    return Weights(ModelId(model), state, bytes, firm=False, last_turn=last_turn)


def start(id: int, agent: str) -> Start:
    return Start(TurnId(id), AgentId(agent))


def open_(id: int, agent: str) -> Open:
    return Open(TurnId(id), AgentId(agent))


def close(agent: str, *, for_turn: int | None) -> Close:
    return Close(AgentId(agent), None if for_turn is None else TurnId(for_turn))


def load(model: str) -> Load:
    return Load(ModelId(model))


def park(model: str) -> Park:
    return Park(ModelId(model))


def all_models(
    waiting: Iterable[WaitingTurn], places: Iterable[Occupant], models: Iterable[Weights] = ()
) -> Mapping[ModelId, Weights]:
    """Those of a moment by their id; the ones that are not mentioned stay on the device."""
    named = {it.model_id: it for it in models}
    used = [*(it.model_id for it in waiting), *(it.model_id for it in places)]
    return {id: named.get(id, firm(id)) for id in (*used, *named)}


def plan(
    waiting: list[WaitingTurn],
    places: list[Occupant],
    models: Iterable[Weights] = (),
    *,
    live_contexts: int = 1,
    room: int = PLENTY,
) -> list[Step]:
    return plan_turns(waiting, places, all_models(waiting, places, models), live_contexts=live_contexts, room_bytes=room)
