"""Agents and the models they use: who comes, who is in, who goes, and whose weights are on the device for them.

An admission is booked whole before anything is loaded, and undone whole if the load fails. Weights go with their last
agent. Does not cover who may come (`admission`, `state`) or whose turn it is (`rotation`).
"""

from __future__ import annotations

from collections.abc import Mapping

from conductor.core import actions, events
from conductor.core.admission import Decision
from conductor.core.books import Books
from conductor.core.kv_books import KvBooks
from conductor.core.ledger import OverCap
from conductor.core.pools import Pool, PoolPhase
from conductor.core.refusals import Refusals
from conductor.core.residency import Model
from conductor.core.rotation import Rotation
from conductor.core.schedule import Schedule
from conductor.core.seating import Seating
from conductor.core.sessions import Agent, Phase, Stage
from conductor.core.streaming import Placement, whole
from conductor.errors import ConductorError, InternalError, RefusalCode, UnknownAgent
from conductor.types import AgentId, ModelId, ModelState, PoolId, ServiceClass


class Roster:
    """`agents` and `models` are the state's own records; who is in them is decided here."""

    def __init__(
        self,
        agents: dict[AgentId, Agent],
        models: dict[ModelId, Model],
        pools: Mapping[PoolId, Pool],
        books: Books,
        kv_books: KvBooks,
        rotation: Rotation,
        seating: Seating,
        schedule: Schedule,
        refusals: Refusals,
    ) -> None:
        self._agents, self._models, self._pools = agents, models, pools
        self._books, self._kv_books, self._rotation, self._refusals = books, kv_books, rotation, refusals
        self._seating, self._schedule = seating, schedule

    # --- coming -------------------------------------------------------------------------------------------------------

    def book(self, event: events.RegisterRequested, decision: Decision, at: float) -> list[actions.Action]:
        """Book the whole of an admission at once; the model is loaded, or the agent admitted, only after."""
        spec = event.agent
        model = self._models.setdefault(spec.model.id, Model(spec.model))
        stayed, model.leavers = [actions.AnswerUnregister(leaver) for leaver in model.leavers], []  # for the newcomer
        lazy = spec.service_class is ServiceClass.BEST_EFFORT
        loads = model.state is ModelState.PARKED and not lazy
        agent = Agent(spec, event.request_id, decision.requested_bytes, self._books.prices.ladder(spec), loads, idle_since=at)
        if agent.guaranteed:
            agent.rung = len(agent.ladder) - 1
        self._agents[spec.id] = agent
        self._books.admit(agent, model)
        if loads:
            model.become("load")
            model.placement = whole(spec.model.blocks) if model.at_home and spec.model.blocks else None
            return [*stayed, actions.LoadModel(spec.model, model.placement)]
        return [*stayed, *(self._settle_in(agent, at) if lazy or model.state is ModelState.RESIDENT else [])]

    def _settle_in(self, agent: Agent, at: float) -> list[actions.Action]:
        """The model is there, or need not be yet; what is guaranteed must be there before it is promised."""
        if agent.guaranteed and agent.seat is None:
            return [self._seating.open_own(agent)]
        agent.stage, agent.idle_since = Stage.ADMITTED, at
        weights = self._books.prices.weights_bytes(agent.spec.model)
        return [
            actions.Admit(agent.registration, agent.spec, weights, agent.context_bytes, agent.charged_bytes, agent.loads_model)
        ]

    # --- models -----------------------------------------------------------------------------------------------------

    def on_model_loaded(self, event: events.ModelLoaded, at: float) -> list[actions.Action]:
        model = self._models[event.model_id]
        model.become("loaded")
        estimated = self._books.prices.held_bytes(model)
        model.estimate_error = (event.weights_bytes - estimated) / estimated if estimated else 0.0
        model.at_home = event.at_home
        try:
            if model.placement is not None and not event.at_home:
                self._books.stay_whole(model)
            self._books.correct_weights(model, event.weights_bytes)
        except OverCap as excess:
            refused = self._refusals.of_bytes(RefusalCode.CAP, excess.requested_bytes, at)
            todo = self._send_off(model.plan.id, refused)
            return todo + (self._unload(model) if model.state is ModelState.RESIDENT else [])
        agents = self.agents_of(event.model_id)
        if not agents:
            return self._unload(model)
        return [action for agent in agents if agent.stage is Stage.LOADING for action in self._settle_in(agent, at)]

    def on_model_load_failed(self, event: events.ModelLoadFailed, at: float) -> list[actions.Action]:
        model = self._models[event.model_id]
        tried = None if model.firm or not (event.at_home or event.unmovable) else model.placement
        model.become("load failed")
        model.at_home = event.at_home
        self._books.release_weights(model)
        if tried is not None and self._may_do_with_another(model, tried, unmovable=event.unmovable):
            return self._forget_model(model)  # turns wait for that
        todo = self._send_off(event.model_id, event.error)
        return todo + self._forget_model(model)

    def _may_do_with_another(self, model: Model, tried: Placement, *, unmovable: bool) -> bool:
        """What was tried cannot be had: a smaller part may do or, if none of the weights move, all of them."""
        if not unmovable:
            return self._books.homes.offer_less(model, tried)
        try:
            self._books.stay_whole(model)
        except OverCap:
            return False
        return True

    def _send_off(self, model_id: ModelId, error: ConductorError) -> list[actions.Action]:
        """The model is not to be had: whoever waits for it, registered for a first time or with a turn, is told so."""
        todo = self._rotation.fail_all(model_id, error)
        for agent in [agent for agent in self.agents_of(model_id) if agent.stage is Stage.LOADING]:
            todo += [actions.Refuse(agent.registration, error), *self._remove(agent)]
        return todo

    def _unload(self, model: Model) -> list[actions.Action]:
        """Nobody uses it any more."""
        model.become("unload")
        model.at_home = False
        return [actions.UnloadModel(model.plan.id)]

    def on_model_unloaded(self, event: events.ModelUnloaded, at: float) -> list[actions.Action]:
        model = self._models[event.model_id]
        model.become("unloaded")
        model.step_s = event.step_s or model.step_s
        if model.reservation is not None:
            self._books.release_weights(model)
        return self._forget_model(model)

    def _forget_model(self, model: Model) -> list[actions.Action]:
        """A parked model that nobody uses any more is forgotten, once its home is free."""
        self._books.keep_promise()
        if model.state is not ModelState.PARKED or self.agents_of(model.plan.id):
            return []
        if self._models.get(model.plan.id) is not model:
            return []
        if model.at_home:
            return self._unload(model)
        self._books.homes.leave(model)
        del self._models[model.plan.id]
        return [actions.AnswerUnregister(leaver) for leaver in model.leavers]

    # --- pools of guaranteed agents, which are made before they are admitted --------------------------------------------

    def on_pool_opened(self, event: events.PoolOpened, at: float) -> list[actions.Action]:
        todo = self._schedule.on_pool_opened(event, at)
        pool = self._pools[event.pool_id]
        agent = self._agents[pool.owner] if pool.owner is not None else None
        if agent is None or agent.stage is not Stage.LOADING:
            return todo
        if pool.phase is PoolPhase.READY:
            return [*todo, self._seating.take(agent, None)]
        excess = self._refusals.of_bytes(RefusalCode.CAP, (event.context_bytes or 0) - agent.context_bytes, at)
        return [*todo, actions.Refuse(agent.registration, excess), *self.leave(agent)]

    def on_pool_open_failed(self, event: events.PoolOpenFailed, at: float) -> list[actions.Action]:
        owner = self._pools[event.pool_id].owner
        return self._schedule.on_pool_open_failed(event, at) + self._turn_away(owner, event.error)

    def on_seat_taken(self, event: events.SeatTaken, at: float) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        todo = self._seating.on_taken(event, at)
        return todo + (self._settle_in(agent, at) if agent.stage is Stage.LOADING else [])

    def on_seat_not_taken(self, event: events.SeatNotTaken, at: float) -> list[actions.Action]:
        return self._schedule.on_seat_not_taken(event, at) + self._turn_away(event.agent_id, event.error)

    def _turn_away(self, agent_id: AgentId | None, error: ConductorError) -> list[actions.Action]:
        """What it was to be guaranteed cannot be made."""
        agent = self._agents[agent_id] if agent_id is not None else None
        if agent is None or agent.stage is not Stage.LOADING:
            return []
        return [actions.Refuse(agent.registration, error), *self.leave(agent)]

    # --- leaving ----------------------------------------------------------------------------------------------------

    def on_unregister(self, event: events.UnregisterRequested, at: float) -> list[actions.Action]:
        agent = self._agents.get(event.agent_id)
        if agent is None or agent.stage is Stage.LOADING:
            return [actions.FailRequest(event.request_id, UnknownAgent(event.agent_id))]
        agent.leavers.append(event.request_id)
        return self.leave(agent)

    def leave(self, agent: Agent) -> list[actions.Action]:
        """Start an agent's departure: it gets no more turns, and `_see_off` takes it from there."""
        if agent.stage is Stage.LEAVING:
            return []
        agent.stage = Stage.LEAVING
        return self._rotation.cancel_all(agent)

    def see_off(self) -> list[actions.Action]:
        """Take the next step of every departure: the seat is left once its turn is over, the pool closed if it was the last
        one's, then the agent is forgotten."""
        todo: list[actions.Action] = []
        for agent in [agent for agent in self._agents.values() if agent.stage is Stage.LEAVING]:
            if agent.phase is Phase.READY or (agent.seat and agent.seat.awaits_host_room):
                todo.append(self._seating.drop(agent))
            elif agent.seat is None and not agent.in_motion and not self._pool_stays_open(agent):
                todo += self._forget(agent)
        return todo

    def _pool_stays_open(self, agent: Agent) -> bool:
        """Close the pool of an agent that goes if nobody else uses it; True while it is there and nobody else does."""
        pool = self._pools.get(agent.pool)
        if pool is None or any(other.pool == agent.pool and other is not agent for other in self._agents.values()):
            return False
        if pool.phase is PoolPhase.READY:
            self._seating.drain(pool, None)
        return True

    def _forget(self, agent: Agent) -> list[actions.Action]:
        model = self._models[agent.model_id]
        if len(self.agents_of(agent.model_id)) == 1:
            model.leavers += agent.leavers
            agent.leavers = []
        todo: list[actions.Action] = [actions.Forget(agent.id), *self._remove(agent)]
        return todo + [actions.AnswerUnregister(leaver) for leaver in agent.leavers]

    def _remove(self, agent: Agent) -> list[actions.Action]:
        """Take an agent and all that is booked for it out of the records; its model goes with its last agent."""
        model = self._models[agent.model_id]
        del self._agents[agent.id]
        self._kv_books.drop(agent)
        self._books.dismiss(agent, model)
        if not any(other.pool == agent.pool for other in self._agents.values()):
            self._seating.forget(agent.pool)
        if not self.agents_of(agent.model_id) and model.state is ModelState.RESIDENT:
            return self._unload(model)
        return self._forget_model(model)

    # --- derived ----------------------------------------------------------------------------------------------------

    def agents_of(self, model_id: ModelId) -> list[Agent]:
        return [agent for agent in self._agents.values() if agent.model_id == model_id]

    def check(self) -> None:
        """Raise InternalError unless models and agents agree."""
        used = {agent.model_id for agent in self._agents.values()}
        firm = {agent.model_id for agent in self._agents.values() if agent.service_class is not ServiceClass.BEST_EFFORT}
        for id, model in self._models.items():
            leaves_home = model.state is ModelState.UNLOADING and not model.at_home and id not in used
            if (model.state is ModelState.PARKED) != (model.reservation is None) and not leaves_home:
                raise InternalError(f"the weights of {model.plan.key} are {model.state.value}, and booked otherwise")
            if model.placement is not None and (model.reservation is None or model.home is None):
                raise InternalError(f"a part of {model.plan.key} is on the device, and not booked, or without a home")
            if model.firm and model.streams:
                raise InternalError(f"the weights of {model.plan.key} are promised to stay, and stream")
            if model.state in (ModelState.PARKED, ModelState.RESIDENT) and id not in used:
                raise InternalError("a model that nobody uses")
            if id in firm and not model.firm:
                raise InternalError(f"the weights of {model.plan.key} are promised to stay, and do not")
        if not used <= self._models.keys():
            raise InternalError("an agent without its model")
