"""Turns: who waits, who runs, who stands still, and how much of the machine each agent has had.

Turns come by priority, in which those who wait grow; then by fair share: the agent that fewer tokens were computed for goes
first; then by arrival. A turn that outgrows its pool's window, or makes way for others after its minimum, stops whole and
stands still: its agent's KV may leave the device, and it goes on later with the same tokens. Does not cover what is done for
whom (`turns`, `schedule`) or how pools and seats come and go (`seating`).
"""

from __future__ import annotations

from collections.abc import Mapping

from conductor.core import actions, events
from conductor.core.books import Books
from conductor.core.events import TurnId
from conductor.core.moment import LAST, Rank
from conductor.core.refusals import Refusals
from conductor.core.residency import Model
from conductor.core.sessions import Agent, Phase, Stage, Turn
from conductor.core.waitlist import seniority
from conductor.errors import (
    ConductorError,
    InternalError,
    TurnCancelled,
    TurnQueueFull,
    TurnTimedOut,
    UnknownAgent,
    WindowRefused,
)
from conductor.types import AgentId, FinishReason, ModelId


class Rotation:
    """`agents` and `models` are the state's own records."""

    def __init__(
        self,
        agents: Mapping[AgentId, Agent],
        models: Mapping[ModelId, Model],
        books: Books,
        refusals: Refusals,
        *,
        ageing_s: float,
        queue_limit: int,
        min_turn_s: float,
    ) -> None:
        self.turns: dict[TurnId, Turn] = {}  #: in the order of arrival
        self._agents, self._models = agents, models
        self._books, self._refusals = books, refusals
        self._ageing_s, self._queue_limit, self._min_turn_s = ageing_s, queue_limit, min_turn_s
        self._turns_begun = 0
        #: by priority: what those who had turns last had been served, when nobody else of theirs was left
        self._shares: dict[int, int] = {}

    # --- coming -------------------------------------------------------------------------------------------------------

    def on_turn(self, event: events.TurnRequested, at: float) -> list[actions.Action]:
        agent = self._agents.get(event.agent_id)
        if agent is None or agent.stage is not Stage.ADMITTED:
            return [actions.FailTurn(event.turn_id, UnknownAgent(event.agent_id))]
        at_once = agent.guaranteed and agent.phase is Phase.READY
        if (waiting := len(self.waiting())) >= self._queue_limit and not at_once:
            return [actions.FailTurn(event.turn_id, TurnQueueFull(agent.id, waiting))]
        self._enter(agent)
        self.turns[event.turn_id] = Turn(event.turn_id, event.agent_id, at, since=at)
        return []

    def _enter(self, agent: Agent) -> None:
        """Whoever was away does not come back with a claim to all that it did not use meanwhile: against those who are there or,
        if nobody is, those who were there last."""
        if not any(turn.agent_id == agent.id and not turn.held for turn in self.turns.values()):
            least = min(self._rivals(agent), default=self._shares.get(agent.spec.priority, 0))
            agent.served = max(agent.served, least)

    def _rivals(self, agent: Agent) -> list[int]:
        """What the others of its priority had who have turns that their readers keep up with."""
        there = (self._agents[turn.agent_id] for turn in self.turns.values() if not (turn.held or turn.fork))
        return [other.served for other in there if other is not agent and other.spec.priority == agent.spec.priority]

    def _go(self, agent: Agent) -> None:
        """A turn of its ended."""
        if not self._rivals(agent):
            priority = agent.spec.priority
            self._shares[priority] = max(agent.served, self._shares.get(priority, 0))

    def start(self, agent: Agent, turn: Turn, room: int, at: float) -> actions.RunTurn:
        agent.become("turn began")
        if agent.seat is not None:
            agent.seat.turn = turn.id
        if not turn.stands_still:
            self._turns_begun += 1
            agent.last_turn, agent.turns = self._turns_begun, agent.turns + 1
            turn.tokens_before = agent.tokens
        turn.growths += turn.outgrew is not None
        turn.running, turn.stands_still, turn.outgrew, turn.since = True, False, None, at
        return actions.RunTurn(turn.id, agent.id, room, turn.evicted, turn.restored, turn.swap_bytes, turn.growths, turn.pauses)

    # --- going on -----------------------------------------------------------------------------------------------------

    def on_progressed(self, event: events.TurnsProgressed, at: float) -> list[actions.Action]:
        for turn in self.running():
            if (computed := event.computed.get(turn.agent_id)) is not None:
                self._count(turn, computed)
        return []

    def _count(self, turn: Turn, computed: int) -> None:
        """Put what was computed for the turn on its agent's account."""
        self._agents[turn.agent_id].served += max(0, computed - turn.counted)
        turn.counted = max(turn.counted, computed)

    def on_held(self, event: events.TurnHeld, at: float) -> list[actions.Action]:
        turn = self.turns.get(event.turn_id)
        if turn is not None and (turn.running or turn.stands_still):
            if turn.held and not event.held:
                self._enter(self._agents[turn.agent_id])
            turn.held = event.held
        return []

    def on_outgrew(self, event: events.TurnOutgrew, at: float) -> list[actions.Action]:
        turn = self.turns[event.turn_id]
        agent = self._stand_still(turn, event, at)
        turn.unbooked, turn.outgrew = True, (event.required_tokens, event.desired_tokens)
        if turn.stopping:
            return self._end(turn, turn.stopping)
        if self._refusals.never_grows(agent, event.required_tokens):
            return self.fail(turn, self._window_refused(turn))
        return []

    def on_paused(self, event: events.TurnPaused, at: float) -> list[actions.Action]:
        turn = self.turns[event.turn_id]
        self._stand_still(turn, event, at)
        turn.pauses += 1
        return self._end(turn, turn.stopping) if turn.stopping else []

    def _stand_still(self, turn: Turn, event: events.TurnOutgrew | events.TurnPaused, at: float) -> Agent:
        agent = self._agents[turn.agent_id]
        agent.tokens, agent.state_bytes = event.tokens, event.state_bytes
        self._count(turn, event.computed_tokens)
        agent.become("turn ended")
        turn.running, turn.pausing, turn.expired, turn.since = False, False, False, at
        turn.stands_still, turn.has_made = True, event.has_made
        return agent

    def pause(self, turn: Turn) -> list[actions.Action]:
        if turn.pausing or turn.stopping or turn.fork:
            return []
        turn.pausing = True
        return [actions.PauseTurn(turn.id, turn.agent_id)]

    def grow(self, turn: Turn) -> None:
        """Book the smallest window that the turn may need until its end or, if that does not fit, any that it can go on in."""
        agent = self._agents[turn.agent_id]
        required, desired = (agent.rung_for(tokens) for tokens in turn.outgrew or (0, 0))
        turn.unbooked = not any(self._books.grow(agent, rung) for rung in range(desired, required - 1, -1))

    def _window_refused(self, turn: Turn) -> WindowRefused:
        agent, needed = self._agents[turn.agent_id], (turn.outgrew or (0, 0))[0]
        return WindowRefused(agent.id, agent.window_in_use, needed, self._refusals.of_growth(agent, needed))

    # --- ending -------------------------------------------------------------------------------------------------------

    def on_finished(self, event: events.TurnFinished, at: float) -> list[actions.Action]:
        turn = self.turns.pop(event.turn_id)
        agent = self._agents[turn.agent_id]
        agent.tokens, agent.state_bytes = event.tokens, event.state_bytes
        self._count(turn, event.computed_tokens)
        if event.prefill_s_per_token is not None:
            self._models[agent.model_id].prefill_s_per_token = event.prefill_s_per_token
        agent.become("turn ended")
        self._go(agent)
        self._books.settle(agent)
        return []

    def on_abandoned(self, event: events.TurnAbandoned, at: float) -> list[actions.Action]:
        turn = self.turns.get(event.turn_id)
        return [] if turn is None else self._cancel(turn, "the caller went away")

    def on_expired(self, event: events.TurnExpired, at: float) -> list[actions.Action]:
        """`Schedule` fails it, unless it starts, or its seat or its KV is under way."""
        turn = self.turns.get(event.turn_id)
        if turn is not None and not turn.running:
            turn.expired = True
        return []

    def on_overdue(self, event: events.TurnOverdue, at: float) -> list[actions.Action]:
        turn = self.turns.get(event.turn_id)
        return [] if turn is None else self._stop(turn, FinishReason.TIMEOUT)

    def on_cancelled(self, event: events.TurnsCancelled, at: float) -> list[actions.Action]:
        if event.agent_id not in self._agents:
            return [actions.FailRequest(event.request_id, UnknownAgent(event.agent_id))]
        own = [turn for turn in self.turns.values() if turn.agent_id == event.agent_id]
        ended = [action for turn in own for action in self._stop(turn, FinishReason.CANCELLED)]
        return [*ended, actions.AnswerCancel(event.request_id, len(own))]

    def cancel_all(self, agent: Agent) -> list[actions.Action]:
        """End the agent's turns, and forks to and from it: those that wait at once, the one that runs after its step."""
        own = [turn for turn in self.turns.values() if turn.agent_id == agent.id and not turn.fork]
        ended = [action for turn in own for action in self._cancel(turn, "the agent was unregistered")]
        forks = [turn for turn in self.waiting() if turn.fork and agent.id in (turn.agent_id, turn.fork.new)]
        return ended + [action for turn in forks for action in self.fail(turn, UnknownAgent(agent.id))]

    def _cancel(self, turn: Turn, reason: str) -> list[actions.Action]:
        """Nobody wants to hear what it made."""
        if turn.running:
            return self._stop(turn, FinishReason.CANCELLED)
        return self.fail(turn, TurnCancelled(turn.agent_id, reason))

    def _stop(self, turn: Turn, reason: FinishReason) -> list[actions.Action]:
        """End it with what it made."""
        if turn.fork:  # if it is under way, it is done in a moment
            return [] if turn.running else self.fail(turn, TurnCancelled(turn.agent_id, reason.value))
        if not turn.running:
            return self._end(turn, reason)
        turn.stopping = turn.stopping or reason
        return [actions.StopTurn(turn.id, turn.agent_id, turn.stopping)]

    def _end(self, turn: Turn, reason: FinishReason) -> list[actions.Action]:
        """A turn that does not run ends with what it made, or as if it had never been."""
        self._leave(turn, keeps=turn.has_made)
        return [actions.EndTurn(turn.id, turn.agent_id, reason)]

    def fail(self, turn: Turn, error: ConductorError) -> list[actions.Action]:
        """A turn that does not run ends; one that had begun leaves the session as it was before it."""
        self._leave(turn, keeps=False)
        if turn.fork:
            return [actions.FailRequest(turn.fork.request_id, error), *self.let_clone_go(self._agents[turn.fork.new])]
        failed = actions.FailTurn(turn.id, error)
        return [failed, actions.DropTurn(turn.agent_id)] if turn.stands_still else [failed]

    def let_clone_go(self, clone: Agent) -> list[actions.Action]:
        """It has no conversation to go on with, and nobody was told that it is there."""
        clone.cloning = False
        if clone.stage is Stage.LEAVING:
            return []
        clone.stage = Stage.LEAVING
        return self.cancel_all(clone)

    def _leave(self, turn: Turn, *, keeps: bool) -> None:
        del self.turns[turn.id]
        agent = self._agents[turn.agent_id]
        self._go(agent)
        if turn.stands_still:
            agent.tokens = agent.tokens if keeps else turn.tokens_before
            self._books.settle(agent)

    def fail_all(self, model_id: ModelId, error: ConductorError) -> list[actions.Action]:
        """The model cannot be loaded: nobody's turn on it can begin."""
        waiting = [turn for turn in self.waiting() if self._agents[turn.agent_id].model_id == model_id]
        # A fork that fails takes the turns of its clone along.
        return [action for turn in waiting if turn.id in self.turns for action in self.fail(turn, error)]

    def time_out(self, turn: Turn, reason: str, at: float) -> list[actions.Action]:
        """It has waited as long as its caller would."""
        waited = TurnTimedOut(turn.agent_id, at - turn.arrived_at, reason)
        return self.fail(turn, self._window_refused(turn) if turn.outgrew else waited)

    # --- derived ------------------------------------------------------------------------------------------------------

    def waiting(self) -> list[Turn]:
        return [turn for turn in self.turns.values() if not turn.running]

    def heads(self) -> dict[AgentId, Turn]:
        """Each agent's first that waits; its others wait behind it."""
        return {turn.agent_id: turn for turn in reversed(self.waiting())}

    def running(self) -> list[Turn]:
        return [turn for turn in self.turns.values() if turn.running]

    def wanted(self) -> frozenset[AgentId]:
        """Who has a turn waiting."""
        return frozenset(turn.agent_id for turn in self.waiting())

    def stuck(self) -> frozenset[AgentId]:
        """Whose turn waits for something that no seat helps with; and so do the agent's later turns."""
        cloning = {id for id, agent in self._agents.items() if agent.cloning}
        return frozenset(it.agent_id for it in self.waiting() if it.unbooked or it.held or it.fork or it.agent_id in cloning)

    def in_use(self) -> frozenset[AgentId]:
        clones = {turn.fork.new for turn in self.turns.values() if turn.fork}
        return frozenset(clones | {turn.agent_id for turn in self.turns.values()})

    def in_order(self, at: float) -> list[Turn]:
        """The turns that wait, in order of precedence. An agent's own keep the order of their arrival."""
        rank = {id: (*self.rank(turn, at), turn.arrived_at) for id, turn in self.heads().items()}
        return sorted(self.waiting(), key=lambda turn: rank[turn.agent_id])

    def rank(self, turn: Turn, at: float) -> Rank:
        """Of a running turn too. Whoever waits rises by whole priorities, so that shares count among equals."""
        agent = self._agents[turn.agent_id]
        if turn.running:
            return LAST if turn.held else (-agent.spec.priority, agent.served)
        return -int(seniority(agent.spec.priority, waited_s=at - turn.since, ageing_s=self._ageing_s) // 1), agent.served

    def ran_its_minimum(self, turn: Turn, at: float) -> bool:
        return turn.held or at - turn.since >= self._min_turn_s

    def note_use(self, at: float) -> None:
        """Agents with a turn, waiting or running, are in use, and so are those that are about to be cloned, or the clones."""
        for id in self.in_use():
            self._agents[id].idle_since = at

    def check(self) -> None:
        """Raise InternalError unless turns and seats agree."""
        running = sorted(turn.agent_id for turn in self.running() if not turn.fork or self._agents[turn.agent_id].seat)
        busy = sorted(agent.id for agent in self._agents.values() if agent.phase is Phase.BUSY)
        if running != busy:
            raise InternalError(f"turns of {running} run, and the seats of {busy} are busy")
        if not all(turn.agent_id in self._agents for turn in self.turns.values()):
            raise InternalError("a turn of a stranger")
