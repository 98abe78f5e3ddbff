"""Pools and the seats in them: made, taken, left and closed, and where an agent's KV goes when it leaves.

Books before it makes: a pool takes its bytes of device memory first, and whoever leaves a seat a place for its KV in host
memory, or on disk, before it is asked to go. Does not cover for whom and when (`rotation`, `turns`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from conductor.core import actions, events
from conductor.core.books import Books
from conductor.core.events import TurnId
from conductor.core.kv_books import KvBooks
from conductor.core.moment import Open
from conductor.core.pools import Pool, PoolPhase
from conductor.core.sessions import Agent, Phase, Seat, Stage, Turn
from conductor.errors import InternalError
from conductor.types import AgentId, KvPlace, PoolId

#: After an opening that failed, none with as many slots for so long; twice as long when it fails again then.
_RETRY_S, _LONGEST_RETRY_S = 60.0, 3600.0


@dataclass(slots=True)
class _Narrowed:
    """A pool could not be made with more slots than this."""

    slots: int
    retry_s: float
    until: float = math.inf  #: more are tried for turns that come later; known when the narrower pool is there


class Seating:
    """`agents`, `turns` and `pools` are the state's own records. `wanted`: who has a turn waiting."""

    def __init__(
        self,
        agents: Mapping[AgentId, Agent],
        turns: Mapping[TurnId, Turn],
        pools: dict[PoolId, Pool],
        books: Books,
        kv_books: KvBooks,
        *,
        wanted: Callable[[], Set[AgentId]],
    ) -> None:
        self._agents, self._turns, self._pools = agents, turns, pools
        self._books, self._kv_books, self._wanted = books, kv_books, wanted
        self._narrowed: dict[PoolId, _Narrowed] = {}

    def seat(self, agent: Agent) -> Seat:
        if agent.seat is None:
            raise InternalError(f"{agent.id} has no seat")
        return agent.seat

    def sitters(self, pool: Pool) -> list[Agent]:
        return [agent for agent in self._agents.values() if agent.seat and agent.seat.pool == pool.id]

    def shapes(self, agent: Agent) -> tuple[tuple[int, int], ...]:
        """(slots, bytes) of the pools that may be made for it."""
        shapes = agent.ladder[agent.rung].shapes
        narrowed = self._narrowed.get(agent.pool)
        if narrowed is None or any(turn.since >= narrowed.until for turn in self._turns.values()):
            return shapes
        return tuple(shape for shape in shapes if shape[0] <= narrowed.slots)

    # --- pools ------------------------------------------------------------------------------------------------------

    def open(self, agent: Agent, step: Open) -> actions.OpenPool:
        return self._open(agent, step.turn_id, step.window, step.slots, step.shapes)

    def open_own(self, agent: Agent) -> actions.OpenPool:
        """A guaranteed agent's."""
        return self._open(agent, None, agent.window_in_use, 1, ((1, agent.context_bytes),))

    def _open(
        self, agent: Agent, turn_id: TurnId | None, window: int, slots: int, shapes: tuple[tuple[int, int], ...]
    ) -> actions.OpenPool:
        context = agent.pool_context(window, slots)
        reservation = self._books.take(agent, dict(shapes)[slots])
        owner = agent.id if agent.guaranteed else None
        self._pools[agent.pool] = Pool(agent.pool, agent.model_id, owner, context, shapes, reservation, turn_id, agent.id)
        return actions.OpenPool(agent.pool, agent.model_id, context, agent.id)

    def on_opened(self, event: events.PoolOpened, at: float) -> None:
        """Raises OverCap with the pool about to close, if it took more than was booked and the rest does not fit."""
        pool = self._pools[event.pool_id]
        pool.become("opened")
        pool.ready_since = at
        narrowed = self._narrowed.get(pool.id)
        if narrowed is not None and pool.context.slots > narrowed.slots:
            self.forget(pool.id)
        elif narrowed is not None and narrowed.until == math.inf:
            narrowed.until = at + narrowed.retry_s
        if event.context_bytes is not None:
            self._books.correct(pool, event.context_bytes)

    def on_open_failed(self, pool: Pool) -> bool:
        """Whether that is for good: with fewer slots it may be had."""
        self._close(pool, "open failed")
        if pool.context.slots == 1:
            return True
        before = self._narrowed.get(pool.id)
        retry_s = before.retry_s if before else _RETRY_S
        if before and before.until < math.inf:
            retry_s = min(2 * retry_s, _LONGEST_RETRY_S)
        self._narrowed[pool.id] = _Narrowed(pool.context.slots // 2, retry_s)
        return False

    def on_closed(self, event: events.PoolClosed, at: float) -> list[actions.Action]:
        self._close(self._pools[event.pool_id], "closed")
        return []

    def _close(self, pool: Pool, happened: str) -> None:
        self._books.give_back(pool)
        pool.become(happened)
        del self._pools[pool.id]

    def forget(self, pool: PoolId) -> None:
        """What is known of earlier openings."""
        self._narrowed.pop(pool, None)

    def drain(self, pool: Pool, for_turn: TurnId | None) -> None:
        """Nobody sits down or starts in it any more; `carry_on` empties it."""
        pool.become("drain")
        pool.turn = for_turn

    def carry_on(self) -> tuple[list[actions.Action], list[Agent]]:
        """The next step of every pool that is being emptied; and the agents in it whose turns run."""
        todo: list[actions.Action] = []
        running: list[Agent] = []
        for pool in [pool for pool in self._pools.values() if pool.phase is PoolPhase.DRAINING]:
            sitters = self.sitters(pool)
            for agent in sitters:
                if agent.phase is Phase.READY and agent.stage is not Stage.LEAVING:
                    todo += self.leave(agent, pool.turn)
            running += [agent for agent in sitters if agent.phase is Phase.BUSY]
            if not sitters:
                pool.become("close")
                todo.append(actions.ClosePool(pool.id))
        return todo, running

    # --- seats ------------------------------------------------------------------------------------------------------

    def take(self, agent: Agent, turn_id: TurnId | None) -> actions.TakeSeat:
        agent.seat = Seat(agent.pool, Phase.TAKING, turn_id)
        return actions.TakeSeat(agent.id, agent.pool)

    def on_taken(self, event: events.SeatTaken, at: float) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self.turn_of(agent)
        agent.become("taken")
        self._kv_books.drop(agent)
        agent.state_bytes = event.restored_bytes
        if turn is not None:
            turn.restored |= event.restored_bytes > 0 and not turn.stands_still
            turn.swap_bytes += event.restored_bytes
        return []

    def leave(self, agent: Agent, for_turn: TurnId | None) -> list[actions.Action]:
        """Give up the seat, with the KV saved as well as it can be."""
        agent.become("leaving")
        self.seat(agent).turn = for_turn
        return self._save(agent)

    def drop(self, agent: Agent) -> actions.Action:
        """Let an agent that goes give up its seat; its KV goes with it."""
        if agent.phase is Phase.READY:
            agent.become("leaving")
        self.seat(agent).awaits_host_room = False
        return actions.LeaveSeat(agent.id, KvPlace.TOKENS)

    def on_left(self, event: events.SeatLeft, at: float) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self.turn_of(agent)
        if turn is not None:
            turn.evicted = agent.id if agent.tokens and turn.agent_id != agent.id else turn.evicted
            turn.swap_bytes += event.saved_bytes
        agent.become("left")
        self._kv_books.settle(agent, event.place, event.saved_bytes)
        agent.state_bytes = 0
        return []

    def turn_of(self, agent: Agent) -> Turn | None:
        """The turn that the agent's seat is taken or left for, unless it is gone by now."""
        turn = self.seat(agent).turn
        return self._turns.get(turn) if turn is not None else None

    # --- where KV goes --------------------------------------------------------------------------------------------------

    def _save(self, agent: Agent) -> list[actions.Action]:
        """Let it leave once there is a place for its KV; if need be, make one."""
        todo: list[actions.Action] = []
        place = self._kv_books.place(agent, wanted=self._wanted())
        if place is None:
            self.seat(agent).awaits_host_room = True
            todo = self._make_host_room()
            place = self._kv_books.place(agent, wanted=self._wanted())
        if place is not None:
            self.seat(agent).awaits_host_room = False
            todo.append(actions.LeaveSeat(agent.id, place))
        return todo

    def _make_host_room(self) -> list[actions.Action]:
        """Let those leave host memory whose agents were away longest, for all that wait to be saved."""
        todo: list[actions.Action] = []
        needed = sum(a.state_bytes for a in self._agents.values() if a.seat and a.seat.awaits_host_room)
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
        """Let those leave who waited for room in host memory and have it now."""
        waiting = [agent for agent in self._agents.values() if agent.seat and agent.seat.awaits_host_room]
        return [action for agent in waiting for action in self._save(agent)]

    def on_kv_moved(self, event: events.KvMoved, at: float) -> list[actions.Action]:
        self._kv_books.moved(self._agents[event.agent_id], event.place, event.elapsed_s)
        return []
