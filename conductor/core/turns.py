"""Whose turn is next, and whose context has to go for it: a pure decision over a picture of the moment.

Turns are taken by priority, then in the order of their arrival. For each waiting turn:

1. its agent's context is ready: start it;
2. its agent's context is on its way, in or out: wait;
3. one live context for each model: an earlier turn of the same model goes first, and another agent's context of it that is
   live must close first;
4. a place is free: open;
5. a place is becoming free: wait for it;
6. close the ready context that was used longest ago, if its agent is not first in line itself;
7. otherwise wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from conductor.core.events import TurnId
from conductor.core.sessions import Phase
from conductor.types import AgentId, ModelId


@dataclass(frozen=True, slots=True)
class WaitingTurn:
    id: TurnId
    agent_id: AgentId
    model_id: ModelId


@dataclass(frozen=True, slots=True)
class Occupant:
    """A live context in the picture."""

    agent_id: AgentId
    model_id: ModelId
    phase: Phase
    last_turn: int


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
    for_turn: TurnId


Step: TypeAlias = Start | Open | Close


def plan_turns(waiting: Sequence[WaitingTurn], occupants: Sequence[Occupant], *, live_contexts: int) -> list[Step]:
    """The steps to take now, `waiting` being in order of precedence. The numbers are those of the module's list."""
    steps: list[Step] = []
    by_agent = {occupant.agent_id: occupant for occupant in occupants}
    by_model = {occupant.model_id: occupant for occupant in occupants}
    free = live_contexts - len(occupants)
    closing = sum(occupant.phase is Phase.CLOSING for occupant in occupants)
    ready = {occupant.agent_id for occupant in occupants if occupant.phase is Phase.READY}
    served: set[AgentId] = set()
    claimed: set[ModelId] = set()  # a second agent of a model must not take, or wait for, a second place
    for turn in waiting:
        if turn.agent_id in served:
            continue
        served.add(turn.agent_id)
        own = by_agent.get(turn.agent_id)
        if own is not None:
            if turn.agent_id in ready:  # (1)
                steps.append(Start(turn.id, turn.agent_id))
                ready.discard(turn.agent_id)
            continue  # (2)
        if turn.model_id in claimed:  # (3)
            continue
        claimed.add(turn.model_id)
        rival = by_model.get(turn.model_id)
        if rival is not None:  # (3)
            if rival.agent_id in ready:
                steps.append(Close(rival.agent_id, turn.id))
                ready.discard(rival.agent_id)
            elif rival.phase is Phase.CLOSING:
                closing -= 1
        elif free > 0:  # (4)
            steps.append(Open(turn.id, turn.agent_id))
            free -= 1
        elif closing > 0:  # (5)
            closing -= 1
        elif ready:  # (6)
            victim = min(ready, key=lambda agent: by_agent[agent].last_turn)
            steps.append(Close(victim, turn.id))
            ready.discard(victim)
    return steps  # (7)
