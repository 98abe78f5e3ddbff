"""Live contexts: made, closed, and where their KV goes when they close.

Books before it makes: a context takes its bytes of device memory first, and a closing one a place for its KV in host
memory, or on disk, before it is asked to go. Does not cover for whom and when (`rotation`, `turns`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

from conductor.core import actions, events
from conductor.core.books import Books
from conductor.core.events import TurnId
from conductor.core.kv_books import KvBooks
from conductor.core.sessions import Agent, LiveContext, Phase
from conductor.errors import InternalError
from conductor.types import AgentId, KvPlace


class Contexts:
    """`agents` are the state's own records; their `live` is changed here. `wanted`: who has a turn waiting."""

    def __init__(
        self, agents: Mapping[AgentId, Agent], books: Books, kv_books: KvBooks, *, wanted: Callable[[], Set[AgentId]]
    ) -> None:
        self._agents, self._books, self._kv_books, self._wanted = agents, books, kv_books, wanted

    def of(self, agent: Agent) -> LiveContext:
        if agent.live is None:
            raise InternalError(f"{agent.id} has no live context")
        return agent.live

    def open(self, agent: Agent, turn_id: TurnId | None) -> actions.OpenContext:
        agent.live = LiveContext(Phase.OPENING, self._books.take(agent), agent.window_in_use, turn_id)
        return actions.OpenContext(agent.id, agent.context, agent.model_id)

    def close(self, agent: Agent, for_turn: TurnId | None) -> list[actions.Action]:
        """Close it, with its KV saved as well as it can be."""
        agent.become("closing")
        self.of(agent).turn = for_turn
        return self._save(agent)

    def drop(self, agent: Agent) -> actions.Action:
        """Close the context of an agent that leaves; its KV goes with it."""
        if agent.phase is Phase.READY:
            agent.become("closing")
        self.of(agent).awaits_host_room = False
        return actions.CloseContext(agent.id, KvPlace.TOKENS)

    def _save(self, agent: Agent) -> list[actions.Action]:
        """Close the context once there is a place for its KV; if need be, make one."""
        todo: list[actions.Action] = []
        place = self._kv_books.place(agent, wanted=self._wanted())
        if place is None:
            self.of(agent).awaits_host_room = True
            todo = self._make_host_room()
            place = self._kv_books.place(agent, wanted=self._wanted())
        if place is not None:
            self.of(agent).awaits_host_room = False
            todo.append(actions.CloseContext(agent.id, place))
        return todo

    def _make_host_room(self) -> list[actions.Action]:
        """Let those leave host memory whose agents were away longest, for all contexts that wait to be saved."""
        todo: list[actions.Action] = []
        needed = sum(a.state_bytes for a in self._agents.values() if a.live and a.live.awaits_host_room)
        for eviction in self._kv_books.evictions(needed, wanted=self._wanted()):
            agent = self._agents[eviction.agent_id]
            if eviction.to is KvPlace.DISK:
                self._kv_books.begin_move(agent)
                todo.append(actions.MoveKv(agent.id))
            else:
                self._kv_books.drop(agent)
                todo.append(actions.DropKv(agent.id))
        return todo

    def save_waiting(self) -> list[actions.Action]:
        """Close those contexts that waited for room in host memory and have it now."""
        waiting = [agent for agent in self._agents.values() if agent.live and agent.live.awaits_host_room]
        return [action for agent in waiting for action in self._save(agent)]

    def on_kv_moved(self, event: events.KvMoved, at: float) -> list[actions.Action]:
        self._kv_books.moved(self._agents[event.agent_id], event.place, event.elapsed_s)
        return []
