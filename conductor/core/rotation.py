"""Turns and the live contexts they take place in: who waits, who runs, whose KV moves for whom.

Carries out `turns.plan_turns` on the records and the books. A context is opened for a turn, stays when the turn is over,
and is closed when somebody needs its room, it was idle for long, or its agent leaves. A turn that outgrows its context
stops whole; its agent's window is booked larger, the context is closed and opened again, and the turn goes on.
"""

from __future__ import annotations

from collections.abc import Mapping

from conductor.core import actions, events, turns
from conductor.core.books import Books
from conductor.core.contexts import Contexts
from conductor.core.events import TurnId
from conductor.core.kv_books import KvBooks
from conductor.core.ledger import OverCap
from conductor.core.refusals import Refusals
from conductor.core.residency import Model
from conductor.core.sessions import Agent, Phase, Stage, Turn
from conductor.core.waitlist import seniority
from conductor.errors import (
    ConductorError,
    InternalError,
    RefusalCode,
    TurnCancelled,
    TurnQueueFull,
    TurnTimedOut,
    UnknownAgent,
    WindowRefused,
)
from conductor.types import AgentId, ModelId, ModelState, ServiceClass


class Rotation:
    """`agents` and `models` are the state's own records. Guaranteed agents aside, at most `live_contexts` have a context."""

    def __init__(
        self,
        agents: Mapping[AgentId, Agent],
        models: Mapping[ModelId, Model],
        books: Books,
        kv_books: KvBooks,
        refusals: Refusals,
        *,
        live_contexts: int,
        ageing_s: float,
        queue_limit: int,
    ) -> None:
        self.live_contexts = live_contexts
        self.turns: dict[TurnId, Turn] = {}  #: in the order of arrival
        self.contexts = Contexts(agents, books, kv_books, wanted=self._wanted)
        self._agents, self._models = agents, models
        self._books, self._kv_books, self._refusals = books, kv_books, refusals
        self._ageing_s, self._queue_limit = ageing_s, queue_limit
        self._turns_begun = 0

    # --- turns ------------------------------------------------------------------------------------------------------

    def on_turn(self, event: events.TurnRequested, at: float) -> list[actions.Action]:
        agent = self._agents.get(event.agent_id)
        if agent is None or agent.stage is not Stage.ADMITTED:
            return [actions.FailTurn(event.turn_id, UnknownAgent(event.agent_id))]
        at_once = agent.guaranteed and agent.phase is Phase.READY
        if (waiting := len(self._waiting_turns())) >= self._queue_limit and not at_once:
            return [actions.FailTurn(event.turn_id, TurnQueueFull(agent.id, waiting))]
        self.turns[event.turn_id] = Turn(event.turn_id, event.agent_id, at)
        return []

    def on_turn_abandoned(self, event: events.TurnAbandoned, at: float) -> list[actions.Action]:
        turn = self.turns.get(event.turn_id)
        return [] if turn is None else self._cancel(turn, "the caller went away")

    def on_turn_expired(self, event: events.TurnExpired, at: float) -> list[actions.Action]:
        """`schedule` fails it, unless it starts, or its place or its KV is under way."""
        turn = self.turns.get(event.turn_id)
        if turn is not None and not turn.running:
            turn.expired = True
        return []

    def _fail_expired(self, at: float) -> list[actions.Action]:
        todo: list[actions.Action] = []
        for turn in [turn for turn in self._waiting_turns() if turn.expired and not self._is_under_way(turn)]:
            waited = TurnTimedOut(turn.agent_id, at - turn.arrived_at, self.reason(turn))
            todo += self._fail(turn, self._window_refused(turn) if turn.outgrew else waited)
        return todo

    def _is_under_way(self, turn: Turn) -> bool:
        """Whether a context is being made for this turn, or cleared away for it: a moment, and no waiting for anybody."""
        agent = self._agents[turn.agent_id]
        if turn.unbooked:
            return False
        cleared = any(a.live and a.live.turn == turn.id and a.phase is Phase.CLOSING for a in self._agents.values())
        return cleared or agent.phase is Phase.OPENING

    def on_turn_finished(self, event: events.TurnFinished, at: float) -> list[actions.Action]:
        agent = self._agents[self.turns.pop(event.turn_id).agent_id]
        agent.tokens, agent.state_bytes = event.tokens, event.state_bytes
        if event.prefill_s_per_token is not None:
            self._models[agent.model_id].prefill_s_per_token = event.prefill_s_per_token
        agent.become("turn ended")
        self._books.settle(agent)
        return []

    def cancel_all(self, agent: Agent) -> list[actions.Action]:
        """End the agent's turns: those that wait at once, the one that runs after its step."""
        own = [turn for turn in self.turns.values() if turn.agent_id == agent.id]
        return [action for turn in own for action in self._cancel(turn, "the agent was unregistered")]

    def _cancel(self, turn: Turn, reason: str) -> list[actions.Action]:
        if turn.running:
            turn.stopping = reason
            return [actions.StopTurn(turn.id)]
        return self._fail(turn, TurnCancelled(turn.agent_id, reason))

    def _fail(self, turn: Turn, error: ConductorError) -> list[actions.Action]:
        """A turn that does not run ends; one that had begun leaves the session as it was before it."""
        del self.turns[turn.id]
        failed = actions.FailTurn(turn.id, error)
        if not turn.outgrew:
            return [failed]
        agent = self._agents[turn.agent_id]
        agent.tokens = turn.tokens_before
        self._books.settle(agent)
        return [failed, actions.DropTurn(agent.id)]

    def fail_all(self, model_id: ModelId, error: ConductorError) -> list[actions.Action]:
        """The model cannot be loaded: nobody's turn on it can begin."""
        waiting = [turn for turn in self._waiting_turns() if self._agents[turn.agent_id].model_id == model_id]
        return [action for turn in waiting for action in self._fail(turn, error)]

    # --- windows that grow --------------------------------------------------------------------------------------------

    def on_turn_outgrew(self, event: events.TurnOutgrew, at: float) -> list[actions.Action]:
        turn = self.turns[event.turn_id]
        agent = self._agents[turn.agent_id]
        if not turn.outgrew:
            turn.tokens_before = agent.tokens
        agent.tokens, agent.state_bytes = event.tokens, event.state_bytes
        agent.become("turn ended")
        turn.running, turn.unbooked, turn.expired = False, True, False
        turn.outgrew = event.required_tokens, event.desired_tokens
        if turn.stopping:
            return self._fail(turn, TurnCancelled(agent.id, turn.stopping))
        if self._refusals.never_grows(agent, event.required_tokens):
            return self._fail(turn, self._window_refused(turn))
        return []

    def _grow(self, turn: Turn) -> None:
        """Book the smallest window that the turn may need until its end or, if that does not fit, any that it can go on in."""
        agent = self._agents[turn.agent_id]
        required, desired = (agent.rung_for(tokens) for tokens in turn.outgrew or (0, 0))
        turn.unbooked = not any(self._books.grow(agent, rung) for rung in range(desired, required - 1, -1))

    def _window_refused(self, turn: Turn) -> WindowRefused:
        agent, needed = self._agents[turn.agent_id], (turn.outgrew or (0, 0))[0]
        return WindowRefused(agent.id, agent.window_in_use, needed, self._refusals.of_growth(agent, needed))

    # --- the plan -----------------------------------------------------------------------------------------------------

    def schedule(self, at: float, *, held_back_bytes: int) -> list[actions.Action]:
        """Start, open, close, load and park what the plan says."""
        waiting = self.in_order(at)
        if not waiting:
            return []
        for turn in waiting:
            if turn.unbooked:
                self._grow(turn)
        plan = turns.plan_turns(
            [self._waiting(turn) for turn in waiting],
            self._occupants(),
            self._weights(),
            live_contexts=self.live_contexts,
            room_bytes=self._books.turn_limit_bytes(held_back_bytes=held_back_bytes),
        )
        todo = [action for step in plan for action in self._take(step)]
        failed = self._fail_expired(at)  # whoever waits behind them has not been planned for
        return todo + failed + (self.schedule(at, held_back_bytes=held_back_bytes) if failed else [])

    def note_use(self, at: float) -> None:
        """Agents with a turn, waiting or running, are in use."""
        for turn in self.turns.values():
            self._agents[turn.agent_id].idle_since = at

    def in_order(self, at: float) -> list[Turn]:
        """The turns that wait, in order of precedence: by priority, in which those who wait grow, then by arrival."""

        def rank(turn: Turn) -> float:
            priority = self._agents[turn.agent_id].spec.priority
            return -seniority(priority, waited_s=at - turn.arrived_at, ageing_s=self._ageing_s)

        return sorted(self._waiting_turns(), key=rank)

    def evict(
        self,
        bytes: int,
        *,
        idle_since: float | None = None,
        also_wanted: bool = True,
        kept_model: ModelId | None = None,
    ) -> list[actions.Action]:
        """Send away what is idle, or was idle `idle_since` then, until so many bytes are free or on their way.

        `also_wanted`: if nothing else brings them, also the contexts of agents that have a turn waiting.
        """
        stuck = {turn.agent_id for turn in self._waiting_turns() if turn.unbooked}  # and so are the agent's later turns
        about_to_start = self._wanted() - stuck
        kept = frozenset[AgentId]() if also_wanted else about_to_start
        occupants, weights = self._occupants(idle_since, kept), self._weights(idle_since, kept_model)
        plan = turns.plan_eviction(occupants, weights, bytes=bytes, last=self._wanted())
        return [action for step in plan for action in self._take(step)]

    def _wanted(self) -> frozenset[AgentId]:
        """Who has a turn waiting."""
        return frozenset(turn.agent_id for turn in self._waiting_turns())

    def _waiting_turns(self) -> list[Turn]:
        return [turn for turn in self.turns.values() if not turn.running]

    def _waiting(self, turn: Turn) -> turns.WaitingTurn:
        agent = self._agents[turn.agent_id]
        window = turn.outgrew[0] if turn.outgrew else 0
        blocked = turn.unbooked or agent.moving_to is not None
        return turns.WaitingTurn(turn.id, agent.id, agent.model_id, agent.context_bytes, window, blocked)

    def _occupants(self, idle_since: float | None = None, kept: frozenset[AgentId] = frozenset()) -> list[turns.Occupant]:
        return [
            turns.Occupant(
                agent_id=agent.id,
                model_id=agent.model_id,
                phase=_apparent_phase(agent, idle_since, kept),
                last_turn=agent.last_turn,
                bytes=self._books.ledger.size(agent.live.reservation),
                window=agent.live.window,
                best_effort=agent.service_class is ServiceClass.BEST_EFFORT,
                guaranteed=agent.guaranteed,
            )
            for agent in self._agents.values()
            if agent.live
        ]

    def _weights(self, idle_since: float | None = None, kept: ModelId | None = None) -> dict[ModelId, turns.Weights]:
        loose: dict[ModelId, list[Agent]] = {id: [] for id, model in self._models.items() if not model.firm}
        for agent in self._agents.values() if loose else ():
            if agent.model_id in loose:
                loose[agent.model_id].append(agent)
        return {
            id: turns.Weights(
                model_id=id,
                state=model.state,
                bytes=self._books.weights_bytes(model.plan),
                firm=model.firm or id == kept or not all(_rested(agent, idle_since) for agent in loose[id]),
                last_turn=0 if model.firm else max((agent.last_turn for agent in loose[id]), default=0),
            )
            for id, model in self._models.items()
        }

    def _take(self, step: turns.Step) -> list[actions.Action]:
        match step:
            case turns.Start(turn_id, agent_id):
                return [self._start(self._agents[agent_id], self.turns[turn_id])]
            case turns.Open(turn_id, agent_id):
                return [self.contexts.open(self._agents[agent_id], turn_id)]
            case turns.Close(agent_id, for_turn):
                return self.contexts.close(self._agents[agent_id], for_turn)
            case turns.Load(model_id):
                model = self._models[model_id]
                self._books.take_weights(model)
                model.become("load")
                return [actions.LoadModel(model.plan)]
            case turns.Park(model_id):
                self._models[model_id].become("unload")
                return [actions.UnloadModel(model_id)]

    def _start(self, agent: Agent, turn: Turn) -> actions.RunTurn:
        agent.become("turn began")
        if not turn.outgrew:
            self._turns_begun += 1
            agent.last_turn, agent.turns = self._turns_begun, agent.turns + 1
        turn.running = True
        return actions.RunTurn(
            turn.id, agent.id, self.contexts.of(agent).window, turn.evicted, turn.restored, turn.swap_bytes, turn.growths
        )

    # --- contexts ---------------------------------------------------------------------------------------------------

    def on_context_opened(self, event: events.ContextOpened, at: float) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self._turn_of(agent)
        agent.become("opened")
        self._kv_books.drop(agent)
        agent.state_bytes = event.restored_bytes
        try:
            if event.context_bytes is not None:
                self._books.correct(agent, self.contexts.of(agent), event.context_bytes)
        except OverCap as excess:
            return self._close_oversized(agent, turn, excess)
        if turn is not None:
            turn.growths += turn.outgrew is not None
            turn.restored |= event.restored_bytes > 0 and not turn.outgrew
            turn.swap_bytes += event.restored_bytes
        return []

    def _close_oversized(self, agent: Agent, turn: Turn | None, excess: OverCap) -> list[actions.Action]:
        """The context took more than was booked, and the rest does not fit: its turn is refused, its KV goes back."""
        todo: list[actions.Action] = []
        if turn is not None:
            todo = self._fail(turn, self._refusals.of_bytes(RefusalCode.CAP, excess.requested_bytes))
        return todo + self.contexts.close(agent, None)

    def on_context_open_failed(self, event: events.ContextOpenFailed, at: float) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self._turn_of(agent)
        self._books.give_back(self.contexts.of(agent))
        agent.become("open failed")
        return [] if turn is None else self._fail(turn, event.error)

    def on_context_closed(self, event: events.ContextClosed, at: float) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self._turn_of(agent)
        if turn is not None:
            turn.evicted = agent.id if agent.tokens and turn.agent_id != agent.id else turn.evicted
            turn.swap_bytes += event.saved_bytes
        self._books.give_back(self.contexts.of(agent))
        agent.become("closed")
        self._kv_books.settle(agent, event.place, event.saved_bytes)
        agent.state_bytes = 0
        return []

    # --- derived ----------------------------------------------------------------------------------------------------

    def reason(self, turn: Turn) -> str:
        """What a waiting turn waits for."""
        agent = self._agents[turn.agent_id]
        rivals = [a for a in self._agents.values() if a.live and a.model_id == agent.model_id and not a.guaranteed]
        if turn.unbooked:
            return f"room for a window of {(turn.outgrew or (0,))[0]} tokens"
        if next(earlier.id for earlier in self.turns.values() if earlier.agent_id == agent.id) != turn.id:
            return "an earlier turn of the same agent"
        if agent.phase is Phase.OPENING:
            return "its context is being made"
        if agent.live is not None or agent.moving_to is not None:
            return "its KV is on its way"
        if self._models[agent.model_id].state is ModelState.LOADING:
            return "its model is being loaded"
        if rivals:
            return f"{rivals[0].id}, an agent of the same model, is live"
        weights = 0 if self._models[agent.model_id].firm else self._books.weights_bytes(agent.spec.model)
        if agent.context_bytes + weights > self._books.turn_limit_bytes():
            return "other programs took memory of this device"
        return "turns of others to end"

    def _turn_of(self, agent: Agent) -> Turn | None:
        """The turn that the agent's context was opened or closed for, unless it is gone by now."""
        turn = self.contexts.of(agent).turn
        return self.turns.get(turn) if turn is not None else None

    def check(self) -> None:
        """Raise InternalError unless turns and contexts agree."""
        live = [agent for agent in self._agents.values() if agent.live and not agent.guaranteed]
        running = [turn.agent_id for turn in self.turns.values() if turn.running]
        busy = [agent.id for agent in self._agents.values() if agent.phase is Phase.BUSY]
        for holds, story in (
            (len(live) <= self.live_contexts, f"{len(live)} live contexts, {self.live_contexts} allowed"),
            (len({agent.model_id for agent in live}) == len(live), "two live contexts of one model"),
            (sorted(running) == sorted(busy), "running turns and busy contexts differ"),
            (all(turn.agent_id in self._agents for turn in self.turns.values()), "a turn of a stranger"),
        ):
            if not holds:
                raise InternalError(story)


def _apparent_phase(agent: Agent, idle_since: float | None, kept: frozenset[AgentId]) -> Phase:
    """A ready context that is not to be closed now is shown as busy."""
    phase = agent.phase or Phase.CLOSING
    return Phase.BUSY if phase is Phase.READY and (agent.id in kept or not _rested(agent, idle_since)) else phase


def _rested(agent: Agent, idle_since: float | None) -> bool:
    """Whether its context may be closed as far as `idle_since` says; without one, always."""
    return idle_since is None or (agent.phase in (None, Phase.READY) and agent.idle_since <= idle_since)
