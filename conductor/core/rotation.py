"""Turns and the live contexts they take place in: who waits, who runs, whose KV moves for whom.

Carries out `turns.plan_turns` on the records and the books. A context is opened for a turn, stays when the turn is over,
and is closed when another agent's turn needs its place or its agent leaves.
"""

from __future__ import annotations

from collections.abc import Mapping

from conductor.core import actions, events, turns
from conductor.core.books import Books
from conductor.core.events import TurnId
from conductor.core.ledger import OverCap
from conductor.core.sessions import Agent, LiveContext, Phase, Stage, Turn
from conductor.errors import InternalError, RefusalCode, TurnCancelled, UnknownAgent
from conductor.types import AgentId, KvPlace


class Rotation:
    """`agents` is the state's own record, read here; at most `live_contexts` of them have a context at once."""

    def __init__(self, agents: Mapping[AgentId, Agent], books: Books, *, live_contexts: int) -> None:
        self.live_contexts = live_contexts
        self.turns: dict[TurnId, Turn] = {}  #: in the order of arrival
        self._agents, self._books = agents, books
        self._turns_begun = 0

    # --- turns ------------------------------------------------------------------------------------------------------

    def on_turn(self, event: events.TurnRequested) -> list[actions.Action]:
        agent = self._agents.get(event.agent_id)
        if agent is None or agent.stage is not Stage.ADMITTED:
            return [actions.FailTurn(event.turn_id, UnknownAgent(event.agent_id))]
        self.turns[event.turn_id] = Turn(event.turn_id, event.agent_id)
        return []

    def on_turn_abandoned(self, event: events.TurnAbandoned) -> list[actions.Action]:
        turn = self.turns.get(event.turn_id)
        return [] if turn is None else [self._cancel(turn, "the caller went away")]

    def on_turn_finished(self, event: events.TurnFinished) -> list[actions.Action]:
        agent = self._agents[self.turns.pop(event.turn_id).agent_id]
        agent.tokens = event.tokens
        agent.become("turn ended")
        return []

    def cancel_all(self, agent: Agent) -> list[actions.Action]:
        """End the agent's turns: those that wait at once, the one that runs after its step."""
        own = [turn for turn in self.turns.values() if turn.agent_id == agent.id]
        return [self._cancel(turn, "the agent was unregistered") for turn in own]

    def _cancel(self, turn: Turn, reason: str) -> actions.Action:
        if turn.running:
            return actions.StopTurn(turn.id)
        del self.turns[turn.id]
        return actions.FailTurn(turn.id, TurnCancelled(turn.agent_id, reason))

    def schedule(self) -> list[actions.Action]:
        """Start, open and close what the plan says."""
        waiting = [turn for turn in self.turns.values() if not turn.running]
        if not waiting:
            return []
        waiting.sort(key=lambda turn: -self._agents[turn.agent_id].spec.priority)
        queue = [turns.WaitingTurn(turn.id, turn.agent_id, self._agents[turn.agent_id].model_id) for turn in waiting]
        occupants = [turns.Occupant(a.id, a.model_id, a.live.phase, a.last_turn) for a in self._agents.values() if a.live]
        return [self._take(step) for step in turns.plan_turns(queue, occupants, live_contexts=self.live_contexts)]

    def _take(self, step: turns.Step) -> actions.Action:
        agent = self._agents[step.agent_id]
        match step:
            case turns.Start(turn_id):
                return self._start(agent, self.turns[turn_id])
            case turns.Open(turn_id):
                agent.live = LiveContext(Phase.OPENING, self._books.take(agent), turn_id)
                return actions.OpenContext(agent.id, agent.spec.context, agent.model_id)
            case turns.Close(_, for_turn):
                agent.become("closing")
                self._live(agent).turn = for_turn
                return actions.CloseContext(agent.id, save=True)

    def _start(self, agent: Agent, turn: Turn) -> actions.RunTurn:
        agent.become("turn began")
        self._turns_begun += 1
        agent.last_turn, agent.turns = self._turns_begun, agent.turns + 1
        turn.running = True
        return actions.RunTurn(turn.id, agent.id, turn.evicted, turn.restored, turn.swap_bytes)

    # --- contexts ---------------------------------------------------------------------------------------------------

    def drop(self, agent: Agent) -> actions.Action:
        """Close the context of an agent that leaves; its KV goes with it."""
        agent.become("closing")
        return actions.CloseContext(agent.id, save=False)

    def on_context_opened(self, event: events.ContextOpened) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self._turn_of(agent)
        agent.become("opened")
        agent.place, agent.host_bytes = KvPlace.SLOT, 0
        try:
            self._books.correct(agent, self._live(agent), event.context_bytes)
        except OverCap as excess:
            return self._close_oversized(agent, turn, excess)
        if turn is not None:
            turn.restored = event.restored_bytes > 0
            turn.swap_bytes += event.restored_bytes
        return []

    def _close_oversized(self, agent: Agent, turn: Turn | None, excess: OverCap) -> list[actions.Action]:
        """The context took more than was booked, and the rest does not fit: its turn is refused, its KV goes back."""
        todo: list[actions.Action] = []
        if turn is not None:
            del self.turns[turn.id]
            todo.append(actions.FailTurn(turn.id, self._books.refuse(RefusalCode.CAP, excess.requested_bytes)))
        agent.become("closing")
        return [*todo, actions.CloseContext(agent.id, save=True)]

    def on_context_open_failed(self, event: events.ContextOpenFailed) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self._turn_of(agent)
        self._books.give_back(self._live(agent))
        agent.become("open failed")
        agent.place = event.place
        if turn is None:
            return []
        del self.turns[turn.id]
        return [actions.FailTurn(turn.id, event.error)]

    def on_context_closed(self, event: events.ContextClosed) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self._turn_of(agent)
        if turn is not None and agent.tokens:
            turn.evicted = agent.id
            turn.swap_bytes += event.saved_bytes
        self._books.give_back(self._live(agent))
        agent.become("closed")
        agent.place, agent.host_bytes = event.place, event.saved_bytes
        return []

    # --- derived ----------------------------------------------------------------------------------------------------

    def _live(self, agent: Agent) -> LiveContext:
        if agent.live is None:
            raise InternalError(f"{agent.id} has no live context")
        return agent.live

    def _turn_of(self, agent: Agent) -> Turn | None:
        """The turn that the agent's context was opened or closed for, unless it is gone by now."""
        turn = self._live(agent).turn
        return self.turns.get(turn) if turn is not None else None

    def check(self) -> None:
        """Raise InternalError unless turns and contexts agree."""
        live = [agent for agent in self._agents.values() if agent.live]
        running = [turn.agent_id for turn in self.turns.values() if turn.running]
        busy = [agent.id for agent in live if agent.phase is Phase.BUSY]
        for holds, story in (
            (len(live) <= self.live_contexts, f"{len(live)} live contexts, {self.live_contexts} allowed"),
            (len({agent.model_id for agent in live}) == len(live), "two live contexts of one model"),
            (sorted(running) == sorted(busy), "running turns and busy contexts differ"),
            (all(turn.agent_id in self._agents for turn in self.turns.values()), "a turn of a stranger"),
        ):
            if not holds:
                raise InternalError(story)
