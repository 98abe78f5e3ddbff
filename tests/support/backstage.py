"""What the engine did, said in the past tense: the half of a `Stage` that plays the engine's part. See `stories`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable

from conductor.core import actions, events
from conductor.core.estimate import ModelPlan
from conductor.core.events import TurnId
from conductor.core.state import State
from conductor.errors import ConductorError, ModelLoadFailed
from conductor.types import AgentId, KvPlace, PoolId
from tests.support.calls import TurnCall
from tests.support.paper_engine import PaperEngine, Work

#: more steps than any story takes: an engine that is asked for more goes round in circles
ENOUGH_STEPS = 2000


class Backstage(ABC):
    state: State
    engine: PaperEngine
    turns: dict[TurnId, TurnCall]
    history: list[events.Event]

    @abstractmethod
    def hear(self, *happened: events.Event) -> None:
        """Tell the state."""

    # --- models -------------------------------------------------------------------------------------------------------

    def loaded(self, plan: ModelPlan, *, weights: int | None = None) -> None:
        """`weights`: what they turned out to take, if not what was booked; of what is placed nothing else can come out."""
        work = self.engine.take(actions.LoadModel, plan.id)
        assert isinstance(work, actions.LoadModel)
        measured = plan.weights_bytes if weights is None else weights
        if work.placement is not None:
            measured = self.state.books.prices.held_bytes(self.state.models[plan.id])
            self.engine.homes.add(plan.id)
        self.engine.weights[plan.id] = measured
        self.hear(events.ModelLoaded(plan.id, measured, at_home=work.placement is not None))

    def stays_whole(self, plan: ModelPlan) -> None:
        """It was to be placed, and its weights turned out to be none that move: all of them are there, or none."""
        work = self.engine.take(actions.LoadModel, plan.id)
        assert isinstance(work, actions.LoadModel)
        if work.placement is not None and work.placement.streams:
            error = ModelLoadFailed(plan.path, "its layers cannot stream")
            self.hear(events.ModelLoadFailed(plan.id, error, unmovable=True))
            return
        self.engine.weights[plan.id] = plan.weights_bytes
        self.hear(events.ModelLoaded(plan.id, plan.weights_bytes))

    def load_failed(self, plan: ModelPlan) -> None:
        self.engine.take(actions.LoadModel, plan.id)
        error = ModelLoadFailed(plan.path, "it is broken")
        self.hear(events.ModelLoadFailed(plan.id, error, at_home=plan.id in self.engine.homes))

    def unloaded(self, model_id: str, *, step_s: float | None = None) -> None:
        work = self.engine.take(actions.UnloadModel, model_id)
        assert isinstance(work, actions.UnloadModel)
        self.engine.weights.pop(work.model_id, None)
        if not work.keep_home:
            self.engine.homes.discard(work.model_id)
        self.hear(events.ModelUnloaded(work.model_id, step_s))

    def opened(
        self, agent: str, *, takes: int | None = None, takes_more: int = 0, kv_lost: bool = False, tells: bool = True
    ) -> None:
        """The agent's pool is there, if it had to be made, and the agent in its seat, if it was to take it.

        `takes`, or `takes_more`: what the pool turned out to take, if not what was booked, and if llama.cpp `tells`.
        """
        pool = self.pool_of(agent)
        if self.engine.is_asked(actions.OpenPool, pool):
            self.pool_opened(pool, takes=takes, takes_more=takes_more, tells=tells)
        if self.engine.is_asked(actions.TakeSeat, agent):
            self.seat_taken(agent, kv_lost=kv_lost)

    def pool_of(self, agent: str) -> PoolId:
        return self.state.agents[AgentId(agent)].pool

    def opening(self, agent: str, *, window: int, slots: int = 1) -> actions.OpenPool:
        """What the engine is asked for when the agent's pool is made for it."""
        spec = self.state.agents[AgentId(agent)].spec
        context = dataclasses.replace(spec.context, window=window, slots=slots)
        return actions.OpenPool(self.pool_of(agent), spec.model.id, context, spec.id)

    def pool_opened(self, pool: PoolId, *, takes: int | None = None, takes_more: int = 0, tells: bool = True) -> None:
        self.engine.take(actions.OpenPool, pool)
        booked = self.state.ledger.size(self.state.pools[pool].reservation)
        measured = max(0, booked + takes_more) if takes is None else takes
        self.engine.contexts[pool] = measured
        self.hear(events.PoolOpened(pool, measured if tells else None))

    def seat_taken(self, agent: str, *, kv_lost: bool = False) -> None:
        self.engine.take(actions.TakeSeat, agent)
        self.hear(events.SeatTaken(AgentId(agent), self.engine.restore(AgentId(agent), kv_lost=kv_lost)))

    def open_failed(self, agent: str, error: ConductorError) -> None:
        """The pool cannot be made or, if it is there, the seat not taken."""
        if self.engine.is_asked(actions.OpenPool, self.pool_of(agent)):
            self.pool_open_failed(self.pool_of(agent), error)
        else:
            self.engine.take(actions.TakeSeat, agent)
            del self.engine.seats[AgentId(agent)]
            self.hear(events.SeatNotTaken(AgentId(agent), error))

    def pool_open_failed(self, pool: PoolId, error: ConductorError) -> None:
        self.engine.take(actions.OpenPool, pool)
        del self.engine.pools[pool]
        self.hear(events.PoolOpenFailed(pool, error))

    def closed(self, agent: str, *, save_fails: bool = False) -> None:
        """The agent has left its seat, if it was to, and its pool is gone, if it was to go."""
        pool = self.pool_of(agent)
        if self.engine.is_asked(actions.LeaveSeat, agent):
            self.seat_left(agent, save_fails=save_fails)
        if self.engine.is_asked(actions.ClosePool, pool):
            self.pool_closed(pool)

    def seat_left(self, agent: str, *, save_fails: bool = False) -> None:
        work = self.engine.take(actions.LeaveSeat, agent)
        assert isinstance(work, actions.LeaveSeat)
        saved = self.engine.leave(work.agent_id, to=KvPlace.TOKENS if save_fails else work.to)
        self.hear(events.SeatLeft(work.agent_id, work.to if saved else KvPlace.TOKENS, saved))

    def pool_closed(self, pool: PoolId) -> None:
        self.engine.take(actions.ClosePool, pool)
        del self.engine.pools[pool], self.engine.contexts[pool]
        self.hear(events.PoolClosed(pool))

    def moved(self, agent: str, *, fails: bool = False, takes_s: float = 0.001) -> None:
        """Its saved KV is on disk now or, if that `fails`, nowhere."""
        self.engine.take(actions.MoveKv, agent)
        place = self.engine.move(AgentId(agent), fails=fails)
        self.hear(events.KvMoved(AgentId(agent), place, takes_s))

    def copied(self, source: str, *, fails: bool = False) -> None:
        """The conversation is cloned, with its KV unless that `fails`."""
        work = self.engine.take(actions.CopyKv, source)
        assert isinstance(work, actions.CopyKv)
        copied = self.engine.copy(work.source, work.new, to=KvPlace.TOKENS if fails else work.to)
        place = work.to if copied else KvPlace.TOKENS
        self.hear(events.KvCopied(work.turn_id, self.engine.tokens.get(work.new, 0), place, copied))

    def outgrew(self, turn: TurnCall, *, tokens: int, desired: int | None = None, has_made: bool = False) -> None:
        """The turn stopped with its session at so many tokens: it needs room for one more, and may need the `desired`."""
        id, state_bytes = self._stands_still(turn, tokens, has_made=has_made)
        turn.required_tokens = required = tokens + 1
        self.hear(events.TurnOutgrew(id, tokens, state_bytes, required, desired or required, tokens, has_made))

    def paused(self, turn: TurnCall, *, tokens: int = 10, has_made: bool = True) -> None:
        """The turn stands still, as it was asked to, with its session at so many tokens."""
        assert turn.pausing
        turn.required_tokens = 0
        id, state_bytes = self._stands_still(turn, tokens, has_made=has_made)
        self.hear(events.TurnPaused(id, tokens, state_bytes, tokens, has_made))

    def _stands_still(self, turn: TurnCall, tokens: int, *, has_made: bool) -> tuple[TurnId, int]:
        self.engine.take(actions.RunTurn, turn.agent)
        id = self.turn_id_of(turn)
        turn.run, turn.expired, turn.pausing = None, False, False
        return id, self.engine.stops(AgentId(turn.agent), id, tokens=tokens, has_made=has_made)

    def progresses(self, **computed: int) -> None:
        """So many tokens were computed for the turns that run."""
        self.hear(events.TurnsProgressed({AgentId(agent): tokens for agent, tokens in computed.items()}))

    def finished(self, turn: TurnCall, *, tokens: int = 10, prefill_s_per_token: float | None = None, computed: int = 0) -> None:
        """The turn is over. `computed`: tokens that it took, its prompt included."""
        self.engine.take(actions.RunTurn, turn.agent)
        state_bytes = self.engine.ends(AgentId(turn.agent), tokens=tokens)
        event = events.TurnFinished(self.turn_id_of(turn), tokens, state_bytes, prefill_s_per_token, computed)
        turn.endings.append(event)
        self.hear(event)

    def does(self, work: Work) -> None:
        """The engine does one of the things it was asked for, and it goes as estimated."""
        match work:
            case actions.LoadModel(plan):
                self.loaded(plan)
            case actions.UnloadModel(model_id):
                self.unloaded(model_id)
            case actions.OpenPool(pool_id):
                self.pool_opened(pool_id)
            case actions.ClosePool(pool_id):
                self.pool_closed(pool_id)
            case actions.TakeSeat(agent_id):
                self.seat_taken(agent_id)
            case actions.LeaveSeat(agent_id):
                self.seat_left(agent_id)
            case actions.RunTurn(turn_id, agent_id, room):
                if self.turns[turn_id].pausing:
                    self.paused(self.turns[turn_id], tokens=min(max(10, self.state.agents[agent_id].tokens), room))
                else:
                    self.finished(self.turns[turn_id], tokens=min(10, room))
            case actions.MoveKv(agent_id):
                self.moved(agent_id)
            case actions.CopyKv(_, source):
                self.copied(source)

    def settle(self) -> None:
        """The engine does everything it is asked for, in order, until there is nothing left."""
        self._works_while(lambda: bool(self.engine.todo))

    def _works_while(self, there_is_need: Callable[[], bool]) -> None:
        for _ in range(ENOUGH_STEPS):
            if not there_is_need():
                return
            self.does(self.engine.todo[0])
        raise AssertionError(f"the engine goes round in circles: {self.history[-6:]}")

    def turn_id_of(self, turn: TurnCall) -> TurnId:
        return next(id for id, known in self.turns.items() if known is turn)
