"""Clones of conversations: `new` begins where `source` is, without its prompt being read again.

A fork waits in line like a turn of `source`, so that it takes the conversation as it is after the turns asked for before. The
KV is copied to host memory, from the seat or from where it is saved; without a place there it is computed again. A guaranteed
clone gives its seat up for the copy and takes it again with it. A clone whose fork fails leaves (`Rotation.fail`).
"""

from __future__ import annotations

from collections.abc import Mapping

from conductor.core import actions, events
from conductor.core.books import Books
from conductor.core.kv_books import KvBooks
from conductor.core.refusals import Refusals
from conductor.core.rotation import Rotation
from conductor.core.seating import Seating
from conductor.core.sessions import Agent, Fork, Phase, Stage, Turn
from conductor.errors import DuplicateAgent, InternalError, UnknownAgent, WindowRefused
from conductor.types import AgentId


class Forks:
    """`agents` are the state's own records."""

    def __init__(
        self,
        agents: Mapping[AgentId, Agent],
        books: Books,
        kv_books: KvBooks,
        rotation: Rotation,
        seating: Seating,
        refusals: Refusals,
    ) -> None:
        self._agents, self._books, self._kv_books = agents, books, kv_books
        self._rotation, self._seating, self._refusals = rotation, seating, refusals
        #: guaranteed clones on their way back to their seats, and what to say when they are there
        self._returning: dict[AgentId, actions.AnswerFork] = {}

    def on_fork(self, event: events.ForkRequested, at: float) -> list[actions.Action]:
        source, new = self._agents.get(event.source), self._agents.get(event.new)
        for id, agent in ((event.source, source), (event.new, new)):
            if agent is None or agent.stage is not Stage.ADMITTED:
                return [actions.FailRequest(event.request_id, UnknownAgent(id))]
        if source is None or new is None or not _like(source, new):  # another of that name has come since
            return [actions.FailRequest(event.request_id, UnknownAgent(event.source))]
        if new is source or not self._is_fresh(new):
            return [actions.FailRequest(event.request_id, DuplicateAgent(event.new))]
        fork = Fork(event.new, event.request_id)
        self._rotation.turns[event.turn_id] = Turn(event.turn_id, event.source, at, since=at, fork=fork)
        new.cloning = True
        return []

    def _is_fresh(self, new: Agent) -> bool:
        return not (new.turns or new.tokens or new.saved or new.cloning or new.id in self._rotation.in_use())

    def begin(self) -> list[actions.Action]:
        """Clone what can be cloned now: nothing of the source's, nor of the clone's, is under way."""
        todo: list[actions.Action] = []
        for agent_id, turn in self._rotation.heads().items():
            source = self._agents[agent_id]
            if turn.fork and source.phase in (None, Phase.READY) and not source.in_motion:
                todo += self._begin(turn, turn.fork, source)
        return todo

    def _begin(self, turn: Turn, fork: Fork, source: Agent) -> list[actions.Action]:
        new = self._agents[fork.new]
        if new.phase is not None:
            return self._seating.leave(new, None) if new.phase is Phase.READY else []
        rung = new.rung_for(source.tokens)
        if new.ladder[rung].window > new.window_in_use and not self._books.grow(new, rung):
            refused = self._refusals.of_growth(new, source.tokens)
            return self._rotation.fail(turn, WindowRefused(new.id, new.window_in_use, source.tokens, refused))
        turn.running = source.cloning = True
        if source.seat is not None:
            source.become("turn began")
        return [actions.CopyKv(turn.id, source.id, new.id, self._kv_books.book_copy(source, new))]

    def on_copied(self, event: events.KvCopied, at: float) -> list[actions.Action]:
        turn = self._rotation.turns.pop(event.turn_id)
        if turn.fork is None:
            raise InternalError(f"a copy for {turn}, which is no fork")
        source, new = self._agents[turn.agent_id], self._agents[turn.fork.new]
        source.cloning = new.cloning = False
        if source.seat is not None:
            source.become("turn ended")
        new.tokens = event.tokens
        self._kv_books.settle(new, event.place, event.copied_bytes)
        answer = actions.AnswerFork(turn.fork.request_id, event.tokens)
        if not new.guaranteed or new.stage is Stage.LEAVING:
            return [answer]
        self._returning[new.id], new.cloning = answer, True
        return [self._seating.take(new, None)]

    def on_seat_taken(self, event: events.SeatTaken) -> list[actions.Action]:
        if (answer := self._returning.pop(event.agent_id, None)) is None:
            return []
        self._agents[event.agent_id].cloning = False
        return [answer]

    def on_seat_not_taken(self, event: events.SeatNotTaken) -> list[actions.Action]:
        if (answer := self._returning.pop(event.agent_id, None)) is None:
            return []
        failed = actions.FailRequest(answer.request_id, event.error)
        return [failed, *self._rotation.let_clone_go(self._agents[event.agent_id])]


def _like(source: Agent, new: Agent) -> bool:
    """Whether the one can have the other's conversation."""
    return (source.model_id, source.spec.context, source.guaranteed) == (new.model_id, new.spec.context, new.guaranteed)
