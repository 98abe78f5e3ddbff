"""The conductor's state machine: `handle(event) -> actions`.

Covers registrations, models and other tasks' reservations, and books every byte of them; turns are `rotation`'s. One
writer, no locks: the shell calls `handle` from one thread, and each call leaves the books complete.

What is booked, and when:
- a model's weights when its first agent is admitted, released when its unload is confirmed;
- the promise to all agents' turns, which live contexts draw from (`books`);
- other tasks' bytes through reserve and release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from conductor.core import actions, events
from conductor.core.admission import Decision, Outcome
from conductor.core.books import Books
from conductor.core.events import AgentSpec
from conductor.core.ledger import Ledger, OverCap
from conductor.core.residency import Model
from conductor.core.rotation import Rotation
from conductor.core.sessions import Agent, Phase, Stage
from conductor.core.waitlist import Waitlist
from conductor.errors import (
    AdmissionRefused,
    DuplicateAgent,
    InternalError,
    RefusalCode,
    UnknownAgent,
    UnknownReservation,
)
from conductor.types import AgentId, Kind, ModelId, ModelState


class State:
    """See the module's docstring. `live_contexts`: the most contexts that may be live at once."""

    def __init__(self, *, cap_bytes: int, live_contexts: int, waitlist_limit: int = 256, id_prefix: str = "r") -> None:
        self.ledger = Ledger(cap_bytes, prefix=id_prefix)
        self.agents: dict[AgentId, Agent] = {}
        self.models: dict[ModelId, Model] = {}
        self.waitlist = Waitlist(limit=waitlist_limit)
        self.books = Books(self.ledger, self.agents, live_contexts=live_contexts)
        self.rotation = Rotation(self.agents, self.books, live_contexts=live_contexts)
        #: registrations that came while their model is being unloaded or the last agent of that name leaves
        self._deferred: list[events.RegisterRequested] = []
        self._handlers: dict[type, Callable[[Any], Iterable[actions.Action]]] = {
            events.RegisterRequested: self._on_register,
            events.RegisterAbandoned: self._on_register_abandoned,
            events.ModelLoaded: self._on_model_loaded,
            events.ModelLoadFailed: self._on_model_load_failed,
            events.ModelUnloaded: self._on_model_unloaded,
            events.UnregisterRequested: self._on_unregister,
            events.OwnerDied: self._on_owner_died,
            events.TurnRequested: self.rotation.on_turn,
            events.TurnAbandoned: self.rotation.on_turn_abandoned,
            events.TurnFinished: self.rotation.on_turn_finished,
            events.ContextOpened: self.rotation.on_context_opened,
            events.ContextOpenFailed: self.rotation.on_context_open_failed,
            events.ContextClosed: self.rotation.on_context_closed,
            events.ReserveRequested: self._on_reserve,
            events.ReleaseRequested: self._on_release,
        }

    def handle(self, event: events.Event) -> list[actions.Action]:
        """Take in one event and return what is to be done about it, in order."""
        todo = list(self._handlers[type(event)](event))
        todo += self._see_off()
        todo += self._take_up_deferred()
        todo += self._admit_waiting()
        todo += self.rotation.schedule()
        return todo

    # --- registration -----------------------------------------------------------------------------------------------

    def _on_register(self, event: events.RegisterRequested) -> list[actions.Action]:
        spec = event.agent
        if self._must_wait_for_leavers(spec):
            self._deferred.append(event)
            return []
        if self._is_known(spec.id):
            return [actions.Refuse(event.request_id, DuplicateAgent(spec.id))]
        decision = self._decide(spec)
        if decision.outcome is Outcome.NEVER_FITS:
            return [actions.Refuse(event.request_id, self._refusal(RefusalCode.NEVER, spec))]
        if decision.outcome is Outcome.FIT and not self.waitlist.ahead_of(spec.priority):
            return self._book(event, decision)
        if not event.may_wait:
            ahead = self.waitlist.ahead_of(spec.priority)
            return [actions.Refuse(event.request_id, self._refusal(RefusalCode.CAP, spec, waiting_ahead=ahead))]
        if self.waitlist.full:
            return [actions.Refuse(event.request_id, self._refusal(RefusalCode.QUEUE_FULL, spec))]
        self.waitlist.add(event)
        return []

    def _book(self, event: events.RegisterRequested, decision: Decision) -> list[actions.Action]:
        """Book the whole of an admission at once; the model is loaded, or the agent admitted, only after."""
        spec, todo = event.agent, list[actions.Action]()
        model = self.models.get(spec.model.id)
        if model is None:
            weights = self.ledger.reserve(spec.model.key, Kind.WEIGHTS, decision.weights_bytes)
            self.models[spec.model.id] = Model(spec.model, weights, ModelState.LOADING)
            todo.append(actions.LoadModel(spec.model))
        price = self.books.price(spec)
        agent = Agent(spec, event.request_id, decision.requested_bytes, price, loads_model=model is None)
        self.agents[spec.id] = agent
        self.books.keep_promise()
        if model is not None and model.state is ModelState.RESIDENT:
            todo.append(self._admit(agent))
        return todo

    def _admit(self, agent: Agent) -> actions.Admit:
        agent.stage = Stage.ADMITTED
        weights = self.ledger.size(self.models[agent.model_id].reservation)
        return actions.Admit(
            agent.registration, agent.spec, weights, agent.context_bytes, agent.charged_bytes, agent.loads_model
        )

    def _on_register_abandoned(self, event: events.RegisterAbandoned) -> list[actions.Action]:
        if (waiting := self.waitlist.remove(event.request_id)) is not None:
            if not event.timed_out:
                return []
            spec = waiting.agent
            return [actions.Refuse(event.request_id, self._refusal(RefusalCode.TIMEOUT, spec))]
        if event.timed_out:  # whoever is past waiting for room will be answered soon; the deferred must not start to wait now
            self._deferred = [replace(r, may_wait=False) if r.request_id == event.request_id else r for r in self._deferred]
            return []
        self._deferred = [request for request in self._deferred if request.request_id != event.request_id]
        leaver = next((agent for agent in self.agents.values() if agent.registration == event.request_id), None)
        return self._leave(leaver) if leaver else []

    def _admit_waiting(self) -> list[actions.Action]:
        """Book those whose turn it is, in order, up to the first who still does not fit."""
        todo: list[actions.Action] = []
        for event in self.waitlist:
            model = self.models.get(event.agent.model.id)
            decision = self._decide(event.agent)
            if decision.outcome is Outcome.NEVER_FITS:  # a context like its own was measured since it came
                self.waitlist.remove(event.request_id)
                todo.append(actions.Refuse(event.request_id, self._refusal(RefusalCode.NEVER, event.agent)))
                continue
            if decision.outcome is not Outcome.FIT or (model is not None and model.state is ModelState.UNLOADING):
                break
            self.waitlist.remove(event.request_id)
            todo += self._book(event, decision)
        return todo

    def _decide(self, spec: AgentSpec) -> Decision:
        return self.books.decide(spec, weights_are_booked=spec.model.id in self.models)

    def _refusal(self, code: RefusalCode, spec: AgentSpec, *, waiting_ahead: int = 0) -> AdmissionRefused:
        booked = spec.model.id in self.models
        return self.books.refuse_agent(code, spec, weights_are_booked=booked, waiting_ahead=waiting_ahead)

    def _must_wait_for_leavers(self, spec: AgentSpec) -> bool:
        """Whether something of the same name is on its way out: a model being unloaded, or an agent (a restarted one's past)."""
        namesake, model = self.agents.get(spec.id), self.models.get(spec.model.id)
        return (namesake is not None and namesake.stage is Stage.LEAVING) or (
            model is not None and model.state is ModelState.UNLOADING
        )

    def _take_up_deferred(self) -> list[actions.Action]:
        """Decide on those whose leavers have left, in the order of their arrival."""
        todo: list[actions.Action] = []
        if any(not self._must_wait_for_leavers(event.agent) for event in self._deferred):
            deferred, self._deferred = self._deferred, []
            for event in deferred:
                todo += self._on_register(event)
        return todo

    # --- models -----------------------------------------------------------------------------------------------------

    def _on_model_loaded(self, event: events.ModelLoaded) -> list[actions.Action]:
        model = self.models[event.model_id]
        model.become("loaded")
        try:
            self.ledger.resize(model.reservation, event.weights_bytes)
        except OverCap as excess:
            return self._unload_overweight(model, excess)
        agents = self._agents_of(event.model_id)
        if not agents:
            return self._unload(model)
        return [self._admit(agent) for agent in agents if agent.stage is Stage.LOADING]

    def _unload_overweight(self, model: Model, excess: OverCap) -> list[actions.Action]:
        """The weights took more than was booked, and the rest does not fit: everybody who waits for them is refused."""
        todo: list[actions.Action] = []
        for agent in self._agents_of(model.plan.id):
            todo.append(actions.Refuse(agent.registration, self.books.refuse(RefusalCode.CAP, excess.requested_bytes)))
            del self.agents[agent.id]
        self.books.keep_promise()
        return todo + self._unload(model)

    def _on_model_load_failed(self, event: events.ModelLoadFailed) -> list[actions.Action]:
        model = self.models.pop(event.model_id)
        model.become("load failed")
        self.ledger.release(model.reservation)
        todo: list[actions.Action] = []
        for agent in self._agents_of(event.model_id):
            del self.agents[agent.id]
            todo.append(actions.Refuse(agent.registration, event.error))
        self.books.keep_promise()
        return todo + [actions.AnswerUnregister(leaver) for leaver in model.leavers]

    def _unload(self, model: Model) -> list[actions.Action]:
        model.become("last agent left")
        return [actions.UnloadModel(model.plan.id)]

    def _on_model_unloaded(self, event: events.ModelUnloaded) -> list[actions.Action]:
        model = self.models.pop(event.model_id)
        model.become("unloaded")
        self.ledger.release(model.reservation)
        return [actions.AnswerUnregister(leaver) for leaver in model.leavers]

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _on_unregister(self, event: events.UnregisterRequested) -> list[actions.Action]:
        agent = self.agents.get(event.agent_id)
        if agent is None or agent.stage is Stage.LOADING:
            return [actions.FailRequest(event.request_id, UnknownAgent(event.agent_id))]
        agent.leavers.append(event.request_id)
        return self._leave(agent)

    def _on_owner_died(self, event: events.OwnerDied) -> list[actions.Action]:
        """Its registrations are answered too: nobody hears it, but the shell's call would wait for ever."""
        todo: list[actions.Action] = []
        for waiting in [w for w in (*self.waitlist, *self._deferred) if w.agent.owner == event.owner]:
            todo += self._on_register_abandoned(events.RegisterAbandoned(waiting.request_id))
            todo.append(actions.Refuse(waiting.request_id, UnknownAgent(waiting.agent.id)))
        for agent in [agent for agent in self.agents.values() if agent.spec.owner == event.owner]:
            if agent.stage is Stage.LOADING:
                todo.append(actions.Refuse(agent.registration, UnknownAgent(agent.id)))
            todo += self._leave(agent)
        for reservation in [id for id, owner in self.books.external.items() if owner == event.owner]:
            self.books.release(reservation)
        return todo

    def _leave(self, agent: Agent) -> list[actions.Action]:
        """Start an agent's departure: it gets no more turns, and `_see_off` takes it from there."""
        if agent.stage is Stage.LEAVING:
            return []
        agent.stage = Stage.LEAVING
        return self.rotation.cancel_all(agent)

    def _see_off(self) -> list[actions.Action]:
        """Take the next step of every departure: close the context once its turn is over, then forget the agent."""
        todo: list[actions.Action] = []
        for agent in [agent for agent in self.agents.values() if agent.stage is Stage.LEAVING]:
            if agent.phase is Phase.READY:
                todo.append(self.rotation.drop(agent))
            elif agent.live is None:
                todo += self._forget(agent)
        return todo

    def _forget(self, agent: Agent) -> list[actions.Action]:
        del self.agents[agent.id]
        self.books.keep_promise()
        todo: list[actions.Action] = [actions.Forget(agent.id)]
        model = self.models[agent.model_id]
        if self._agents_of(agent.model_id):
            return todo + [actions.AnswerUnregister(leaver) for leaver in agent.leavers]
        model.leavers += agent.leavers
        return todo + (self._unload(model) if model.state is ModelState.RESIDENT else [])

    # --- other tasks' bytes -----------------------------------------------------------------------------------------

    def _on_reserve(self, event: events.ReserveRequested) -> list[actions.Action]:
        try:
            reservation = self.books.reserve(event.holder, event.bytes, event.owner)
        except AdmissionRefused as refused:
            return [actions.FailRequest(event.request_id, refused)]
        return [actions.AnswerReserve(event.request_id, reservation)]

    def _on_release(self, event: events.ReleaseRequested) -> list[actions.Action]:
        if event.reservation_id not in self.books.external:
            return [actions.FailRequest(event.request_id, UnknownReservation(event.reservation_id))]
        return [actions.AnswerRelease(event.request_id, self.books.release(event.reservation_id))]

    # --- derived ----------------------------------------------------------------------------------------------------

    def _agents_of(self, model_id: ModelId) -> list[Agent]:
        return [agent for agent in self.agents.values() if agent.model_id == model_id]

    def _is_known(self, agent_id: AgentId) -> bool:
        return agent_id in self.agents or any(w.agent.id == agent_id for w in (*self.waitlist, *self._deferred))

    def check(self) -> None:
        """Raise InternalError unless the books and the records agree."""
        self.books.check(model.reservation for model in self.models.values())
        self.rotation.check()
        used = {agent.model_id for agent in self.agents.values()}
        if not used <= self.models.keys():
            raise InternalError("an agent without its model")
        if any(model.state is ModelState.RESIDENT and id not in used for id, model in self.models.items()):
            raise InternalError("a resident model that nobody uses")
