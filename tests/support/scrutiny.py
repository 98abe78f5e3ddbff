"""What must hold after every event of every story, whatever it is about.

`State.check` knows its own invariants; here are those that a caller would state: nothing is booked beyond the cap, the books
say what the engine holds, nobody is dropped, nobody overtakes, what is guaranteed is there, and nobody waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from conductor.core import actions, admission, events
from conductor.core.admission import Outcome
from conductor.core.events import RequestId
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Agent, Phase, Stage, Turn
from conductor.core.state import State
from conductor.core.waitlist import Waiting, seniority
from conductor.types import AgentId, ModelId, ModelState, OwnerId, ServiceClass
from tests.support.calls import Call
from tests.support.paper_engine import PaperEngine


@dataclass(frozen=True)
class _Guest:
    """Somebody admitted, as before the event."""

    registration: RequestId
    owner: OwnerId | None
    idle_since: float
    idles: bool
    cloning: bool


class Scrutiny:
    """`watch` before the state hears of something, `check` after."""

    def __init__(self, state: State, engine: PaperEngine) -> None:
        self.state, self.engine = state, engine
        self._happened: Sequence[events.Event] = ()
        self._at = 0.0
        self._allocated = 0
        self._in_use = 0
        self._guests: dict[AgentId, _Guest] = {}
        self._known: set[RequestId] = set()
        self._line: list[Waiting] = []

    def watch(self, happened: Sequence[events.Event], at: float) -> None:
        state = self.state
        self._happened, self._at = happened, at
        self._allocated = state.ledger.allocated_bytes
        self._in_use = self._physically_in_use()
        busy = state.rotation.in_use()
        self._guests = {
            agent.id: _Guest(agent.registration, agent.spec.owner, agent.idle_since, agent.id not in busy, agent.cloning)
            for agent in state.agents.values()
            if agent.stage is Stage.ADMITTED
        }
        self._known = {agent.registration for agent in state.agents.values()}
        self._line = state.waitlist.in_order(at)

    def check(self, calls: Iterable[Call]) -> None:
        self.state.check()
        self._check_the_cap()
        self._check_the_promise()
        self._check_the_books_against_the_engine()
        self._check_what_is_firm()
        self._check_that_nobody_was_dropped(calls)
        self._check_that_nobody_overtook()
        self._check_that_nobody_outstays()
        self._check_what_is_guaranteed()
        if self.engine.todo and all(isinstance(work, actions.RunTurn) for work in self.engine.todo):
            self._check_that_only_turns_are_waited_for()
        if not self.engine.todo:
            self._check_that_nobody_waits_for_nothing(calls)

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _check_the_cap(self) -> None:
        ledger, books = self.state.ledger, self.state.books
        assert not ledger.overdrawn_bytes or books.drifts, "booked beyond the cap, and no stranger came"
        if not any(isinstance(event, events.DeviceRead) for event in self._happened):
            assert ledger.allocated_bytes <= max(self._allocated, ledger.cap_bytes), "more booked than the device has left"
            physical = max(self._in_use, ledger.cap_bytes, books.physical_bytes)
            measured = any(isinstance(event, (events.ModelLoaded, events.PoolOpened)) for event in self._happened)
            assert self._physically_in_use() <= physical or measured, "more in use than the device has"

    def _physically_in_use(self) -> int:
        """What is on the device or on its way there."""
        room = self.state.books.room()
        there = self.state.pools
        guarantees = (agent.guarantee for agent in self.state.agents.values() if agent.guarantee and agent.pool not in there)
        return room.firm_bytes + room.in_use_bytes - sum(map(self.state.ledger.size, guarantees))

    def _check_the_promise(self) -> None:
        """Whatever is promised is booked, and fits. Where strangers came, only shared agents' part does."""
        room, promise = self.state.books.room(), self.state.books.promise()
        assert room.firm_bytes + promise.turn_bytes <= room.best_cap_bytes
        assert room.turn_room_bytes >= promise.shared_turn_bytes
        assert self.state.books.drifts or room.turn_room_bytes >= promise.turn_bytes

    def _check_the_books_against_the_engine(self) -> None:
        state, ledger, saved = self.state, self.state.ledger, self.state.kv_books.saved_bytes
        for model in state.models.values():
            if model.state is ModelState.RESIDENT:
                assert model.reservation
                assert state.books.prices.held_bytes(model) == self.engine.weights[model.plan.id]
        assert state.pools.keys() == self.engine.pools.keys()
        for id, pool in state.pools.items():
            if pool.phase is PoolPhase.READY:
                assert ledger.size(pool.reservation) == self.engine.contexts[id]
        copies = {turn.fork.new for turn in state.rotation.running() if turn.fork}
        for id, agent in state.agents.items():
            assert (agent.seat.pool if agent.seat else None) == self.engine.seats.get(id)
            if id in copies:
                assert saved(agent) >= self.engine.saved.get(id, 0) == 0, "a place is booked for a copy, or none"
            elif agent.seat is None:
                assert saved(agent) == self.engine.saved.get(id, 0)

    def _check_what_is_firm(self) -> None:
        """Weights stay on the device for guaranteed and shared agents only."""
        users: dict[str, set[ServiceClass]] = {}
        for agent in self.state.agents.values():
            users.setdefault(agent.model_id, set()).add(agent.service_class)
        for id, model in self.state.models.items():
            if id in users:
                assert model.firm == (users[id] != {ServiceClass.BEST_EFFORT}), f"{id} is used by {users[id]}"

    # --- agents -------------------------------------------------------------------------------------------------------

    def _check_that_nobody_was_dropped(self, calls: Iterable[Call]) -> None:
        admitted = {agent.id for agent in self.state.agents.values() if agent.stage is Stage.ADMITTED}
        forks = [(call.asked, call) for call in calls]
        failed = {fork.new for fork, call in forks if isinstance(fork, events.ForkRequested) and call.has_failed}
        for id in self._guests.keys() - admitted:
            explained = any(self._explains(event, id, self._guests[id]) for event in self._happened)
            asked_now = {event.new for event in self._happened if isinstance(event, events.ForkRequested)}
            assert explained or (id in failed and (self._guests[id].cloning or id in asked_now)), f"{id} was dropped"

    def _explains(self, event: events.Event, id: AgentId, guest: _Guest) -> bool:
        match event:
            case events.UnregisterRequested(_, agent_id):
                return agent_id == id
            case events.OwnerDied(owner):
                return owner == guest.owner
            case events.Closing():
                return True
            case events.RegisterAbandoned(request_id, timed_out):
                return request_id == guest.registration and not timed_out
            case events.DeviceRead():
                ttl = self.state.rules.idle_ttl_s
                return guest.idles and ttl is not None and self._at - guest.idle_since >= ttl
        return False

    def _check_that_nobody_overtook(self) -> None:
        """Of those who waited before, nobody waits still who was ahead of somebody that is in now."""
        state = self.state
        admitted = {agent.registration: agent for agent in state.agents.values() if agent.registration not in self._known}
        waiting = {waiting.request.request_id for waiting in state.waitlist}
        passed: list[float] = []  #: ranks of those who waited and wait still, in order
        for place in self._line:
            rank = seniority(place.request.agent.priority, waited_s=self._at - place.since, ageing_s=state.rules.ageing_s)
            if place.request.request_id in waiting:
                passed.append(rank)
            elif admitted.pop(place.request.request_id, None) is not None:
                assert not passed, f"{place} overtook"
        for newcomer in admitted.values():
            assert not passed or passed[0] < newcomer.spec.priority, f"{newcomer.spec} overtook"

    def _check_that_nobody_outstays(self) -> None:
        """Whoever had no turn for `idle_ttl_s` goes when the device is read."""
        ttl = self.state.rules.idle_ttl_s
        if ttl is not None and isinstance(self._happened[-1], events.DeviceRead):
            here = {agent.registration for agent in self.state.agents.values() if agent.stage is Stage.ADMITTED}
            for id, guest in self._guests.items():
                assert not (guest.registration in here and guest.idles and self._at - guest.idle_since >= ttl), f"{id} stays"

    def _check_what_is_guaranteed(self) -> None:
        """The whole window of a guaranteed agent is live, and its turns wait for nothing but each other."""
        for agent in self.state.agents.values():
            if agent.guaranteed and agent.stage is Stage.ADMITTED:
                assert agent.seat is not None or agent.cloning
                assert self.state.pools[agent.pool].context.window == agent.spec.context.window
                if agent.cloning or any(turn.fork for turn in self.state.rotation.waiting() if turn.agent_id == agent.id):
                    continue
                waits = agent.id in self.state.rotation.wanted()
                assert agent.phase in ((Phase.BUSY,) if waits else (Phase.READY, Phase.BUSY)), f"{agent.id} is {agent.phase}"

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _check_that_only_turns_are_waited_for(self) -> None:
        """Turns run, none is about to stop, and nothing else is under way: whoever waits could go on only if one of them ended,
        or had run its minimum."""
        state, line = self.state, self.state.waitlist.in_order(self._at)
        if any(turn.pausing or turn.stopping for turn in state.rotation.running()):
            return
        decision = state.books.decide(line[0].request.agent) if line else None
        assert decision is None or decision.outcome is Outcome.WAIT
        used = {agent.pool for agent in state.agents.values() if agent.phase is Phase.BUSY and not agent.guaranteed}
        limit = state.books.turn_limit_bytes()
        taken = sum(state.ledger.size(state.pools[id].reservation) for id in used)
        held = [state.models[model] for model in {state.pools[id].model_id for id in used}]
        taken += sum(state.books.prices.held_bytes(model) for model in held if not model.firm)
        cleared = False  # a pool, for somebody who waits: those behind start there no more
        for turn in self._heads():
            agent = state.agents[turn.agent_id]
            needed = agent.context_bytes + self._loose_weights_bytes(agent.model_id)
            if turn.unbooked:
                assert not self._may_grow(agent, turn), f"{turn} waits for a window that it could have"
            elif turn.fork:
                assert agent.phase is Phase.BUSY or agent.cloning, f"{turn} waits for nothing"
            elif turn.held or agent.guaranteed or agent.cloning:
                continue
            elif agent.pool in used:
                pool = state.pools[agent.pool]
                sitters = [it.phase for it in state.agents.values() if it.seat and it.seat.pool == pool.id]
                crowded = sitters.count(Phase.BUSY) == pool.context.slots or agent.phase is Phase.BUSY
                small = pool.context.window <= agent.tokens or (turn.outgrew and pool.context.window < turn.outgrew[0])
                assert crowded or small or cleared, f"{turn} waits for nothing"
                cleared = cleared or bool(small)
            elif needed <= limit:
                places = state.rules.live_contexts
                full = places is not None and len(used) >= places
                assert full or taken + needed > limit or state.rules.min_turn_s, f"{turn} waits for nothing"
                if not state.rules.min_turn_s:
                    return
                cleared = True

    def _loose_weights_bytes(self, id: ModelId) -> int:
        model = self.state.models[id]
        return 0 if model.firm else self.state.books.prices.least_bytes(model.plan)

    def _check_that_nobody_waits_for_nothing(self, calls: Iterable[Call]) -> None:
        """The engine has nothing to do, so whoever waits must wait for somebody to leave."""
        state, stuck = self.state, [turn for turn in self._heads() if not self._waits_for_room(turn)]
        assert not stuck, f"{stuck} wait, and the engine has nothing to do"
        assert all(agent.stage is Stage.ADMITTED for agent in state.agents.values())
        assert all(agent.phase in (None, Phase.READY) for agent in state.agents.values())
        assert all(agent.moving_to is None for agent in state.agents.values())
        assert all(pool.phase is PoolPhase.READY for pool in state.pools.values())
        assert all(model.state in (ModelState.RESIDENT, ModelState.PARKED) for model in state.models.values())
        room, line = state.books.room(), state.waitlist.in_order(self._at)
        assert not room.in_use_bytes or room.firm_bytes + room.in_use_bytes <= room.cap_bytes, "what idles did not give way"
        in_line: set[object] = {waiting.request.request_id for waiting in line if waiting.request.may_wait}
        for call in calls:
            if call.waits and not call.cancelled:
                in_turn = isinstance(call.asked, events.ForkRequested) and self._waits_to_be_cloned(call.asked.new)
                assert in_turn or call.asked.request_id in in_line, f"{call.asked} waits for nothing"
        if line:
            decision = state.books.decide(line[0].request.agent)
            assert decision.outcome is Outcome.WAIT, f"{line[0]} waits, and the decision is {decision}"

    def _heads(self) -> list[Turn]:
        """The first waiting turn of each agent, in order of precedence; the others wait behind it."""
        first: dict[AgentId, Turn] = {}
        for turn in self.state.rotation.in_order(self._at):
            first.setdefault(turn.agent_id, turn)
        return list(first.values())

    def _waits_for_room(self, turn: Turn) -> bool:
        """Whether a turn may wait although nothing goes on: for a window that cannot be booked, or for strangers to go."""
        agent, books = self.state.agents[turn.agent_id], self.state.books
        if turn.held or self._waits_to_be_cloned(agent.id):
            return True
        if turn.unbooked:
            return not self._may_grow(agent, turn)
        weights = self._loose_weights_bytes(agent.model_id)
        return books.drifts and agent.context_bytes + weights > books.turn_limit_bytes()

    def _waits_to_be_cloned(self, clone: AgentId) -> bool:
        """Whether it is to have the conversation of an agent whose turns before that wait for room."""
        heads = {turn.agent_id: turn for turn in self._heads()}
        source = next((it.agent_id for it in self.state.rotation.waiting() if it.fork and it.fork.new == clone), None)
        return source is not None and self._waits_for_room(heads[source])

    def _may_grow(self, agent: Agent, turn: Turn) -> bool:
        """Whether the promise would hold with the least window that the turn can go on in."""
        assert turn.outgrew
        books, room = self.state.books, self.state.books.room()
        larger = agent.ladder[agent.rung_for(turn.outgrew[0])].context_bytes
        tenants = [books.prices.tenant(a) for a in self.state.agents.values() if a is not agent]
        own = replace(books.prices.tenant(agent), context_bytes=larger)
        return room.firm_bytes + admission.promise([*tenants, own]).turn_bytes <= room.cap_bytes
