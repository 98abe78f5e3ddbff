"""The conductor's state machine: `handle(events, at) -> actions`.

Covers registrations, models and other tasks' reservations, and books every byte of them; turns are `rotation`'s. One
writer, no locks: the shell calls `handle` from one thread, and each call leaves the books complete. `at` is the time of
the shell's monotonic clock, in seconds.

What is booked, and when:
- a model's weights when its first guaranteed or shared agent is admitted, or when a best-effort agent's turn needs them;
- a guaranteed agent's whole window at its admission, and its context is made before the admission is answered;
- one turn of all others, which live pools draw from (`books`); more while it is free;
- other tasks' bytes through reserve and release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from conductor.core import actions, events
from conductor.core.admission import Outcome
from conductor.core.books import Books
from conductor.core.events import AgentSpec, RequestId
from conductor.core.forks import Forks
from conductor.core.kv_books import KvBooks
from conductor.core.ledger import Ledger
from conductor.core.pools import Pool
from conductor.core.refusals import Refusals
from conductor.core.residency import Model
from conductor.core.roster import Roster
from conductor.core.rotation import Rotation
from conductor.core.schedule import Schedule
from conductor.core.seating import Seating
from conductor.core.sessions import Agent, Stage
from conductor.core.waitlist import Waitlist
from conductor.errors import (
    DuplicateAgent,
    RefusalCode,
    UnknownAgent,
    UnknownReservation,
)
from conductor.types import AgentId, ModelId, ModelState, PoolId, ReservationId, ServiceClass


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says about the policy. Times in seconds; None is never."""

    live_contexts: int | None = 1
    min_turn_s: float = 0.0
    waitlist_limit: int = 256
    turn_queue_limit: int = 1024
    host_bytes: int = 1 << 40
    disk_bytes: int = 0
    ageing_s: float = 60.0
    idle_shrink_s: float | None = None
    idle_ttl_s: float | None = None
    home_bytes: int = 0
    link_bytes_per_s: float = 10e9


class State:
    """See the module's docstring."""

    def __init__(self, rules: Rules, *, cap_bytes: int, id_prefix: str = "r") -> None:
        self.rules = rules
        self.ledger = Ledger(cap_bytes, prefix=id_prefix)
        self.agents: dict[AgentId, Agent] = {}
        self.models: dict[ModelId, Model] = {}
        self.waitlist = Waitlist(limit=rules.waitlist_limit, ageing_s=rules.ageing_s)
        self.pools: dict[PoolId, Pool] = {}
        self.books = Books(
            self.ledger, self.agents, self.models, self.pools,
            home_bytes=rules.home_bytes, link_bytes_per_s=rules.link_bytes_per_s,
        )  # fmt: skip
        self.kv_books = KvBooks(self.agents, self.models, host_bytes=rules.host_bytes, disk_bytes=rules.disk_bytes)
        self.refusals = Refusals(self.books, idle=self._idle_agents, idle_ttl_s=rules.idle_ttl_s)
        self.rotation = Rotation(
            self.agents, self.models, self.books, self.refusals,
            ageing_s=rules.ageing_s, queue_limit=rules.turn_queue_limit, min_turn_s=rules.min_turn_s,
        )  # fmt: skip
        self.seating = Seating(
            self.agents, self.rotation.turns, self.pools, self.books, self.kv_books, wanted=self.rotation.wanted
        )
        self.schedule = Schedule(
            self.agents, self.models, self.pools, self.books, self.rotation, self.seating, self.refusals,
            live_contexts=rules.live_contexts, min_turn_s=rules.min_turn_s,
        )  # fmt: skip
        self.roster = Roster(
            self.agents, self.models, self.pools, self.books, self.kv_books, self.rotation, self.seating, self.schedule,
            self.refusals,
        )  # fmt: skip
        self.forks = Forks(self.agents, self.books, self.kv_books, self.rotation, self.seating, self.refusals)
        #: by the request that asked for it: to be given back if nobody receives the answer
        self._reserved: dict[RequestId, ReservationId] = {}
        #: registrations that came while their model is being unloaded or the last agent of that name leaves
        self._deferred: list[events.RegisterRequested] = []
        #: other tasks' reservations whose room is being cleared
        self._reserving: list[events.ReserveRequested] = []
        self._handlers: dict[type, Callable[[Any, float], Iterable[actions.Action]]] = {
            events.RegisterRequested: self._on_register,
            events.RegisterAbandoned: self._on_register_abandoned,
            events.ModelLoaded: self.roster.on_model_loaded,
            events.ModelLoadFailed: self.roster.on_model_load_failed,
            events.ModelUnloaded: self.roster.on_model_unloaded,
            events.UnregisterRequested: self.roster.on_unregister,
            events.OwnerDied: self._on_owner_died,
            events.TurnRequested: self.rotation.on_turn,
            events.TurnAbandoned: self.rotation.on_abandoned,
            events.TurnsCancelled: self.rotation.on_cancelled,
            events.TurnOverdue: self.rotation.on_overdue,
            events.ForkRequested: self.forks.on_fork,
            events.KvCopied: self.forks.on_copied,
            events.TurnHeld: self.rotation.on_held,
            events.TurnsProgressed: self.rotation.on_progressed,
            events.TurnExpired: self.rotation.on_expired,
            events.TurnOutgrew: self.rotation.on_outgrew,
            events.TurnPaused: self.rotation.on_paused,
            events.TurnFinished: self.rotation.on_finished,
            events.PoolOpened: self.roster.on_pool_opened,
            events.PoolOpenFailed: self.roster.on_pool_open_failed,
            events.PoolClosed: self.seating.on_closed,
            events.SeatTaken: self._on_seat_taken,
            events.SeatNotTaken: self._on_seat_not_taken,
            events.SeatLeft: self.seating.on_left,
            events.KvMoved: self.seating.on_kv_moved,
            events.DeviceRead: self._on_device_read,
            events.Closing: self._on_closing,
            events.ReserveRequested: self._on_reserve,
            events.ReserveAbandoned: self._on_reserve_abandoned,
            events.ReleaseRequested: self._on_release,
        }

    def handle(self, *happened: events.Event, at: float) -> list[actions.Action]:
        """Take in what happened at once and return what is to be done about it, in order."""
        todo: list[actions.Action] = []
        self.rotation.note_use(at)
        for event in happened:
            todo += self._handlers[type(event)](event, at)
        todo += self.roster.see_off()
        todo += self._take_up_deferred(at)
        todo += self._give_way(at)
        todo += self._answer_reserving(at)
        admitted, held_back_bytes, kept_model = self._admit_waiting(at)
        todo += admitted
        todo += self.seating.save_waiting()
        held_back_bytes += sum(event.bytes for event in self._reserving)
        todo += self.schedule.plan(at, held_back_bytes=held_back_bytes, kept_model=kept_model)
        forks = self.forks.begin()
        return todo + forks + (self.handle(at=at) if forks else [])  # of a clone that was refused, the bytes are to be had

    # --- registration -----------------------------------------------------------------------------------------------

    def _on_register(self, event: events.RegisterRequested, at: float) -> list[actions.Action]:
        spec = event.agent
        if self._must_wait_for_leavers(spec):
            self._deferred.append(event)
            return []
        if self._is_known(spec.id):
            return [actions.Refuse(event.request_id, DuplicateAgent(spec.id))]
        decision, ahead = self.books.decide(spec), self.waitlist.ahead_of(spec.priority, at)
        if decision.outcome is Outcome.NEVER_FITS:
            return [self._refuse(event, RefusalCode.NEVER, at)]
        if decision.outcome is Outcome.FIT and not ahead:
            return self.roster.book(event, decision, at)
        if not event.may_wait and (ahead or decision.outcome is not Outcome.EVICT):
            return [self._refuse(event, RefusalCode.CAP, at, waiting_ahead=ahead)]
        if event.may_wait and self.waitlist.full and (ahead or decision.outcome is not Outcome.EVICT):
            return [self._refuse(event, RefusalCode.QUEUE_FULL, at)]
        self.waitlist.add(event, at)
        return []

    def _refuse(self, event: events.RegisterRequested, code: RefusalCode, at: float, *, waiting_ahead: int = 0) -> actions.Refuse:
        return actions.Refuse(event.request_id, self.refusals.of_agent(code, event.agent, at, waiting_ahead=waiting_ahead))

    def _on_register_abandoned(self, event: events.RegisterAbandoned, at: float) -> list[actions.Action]:
        if (waiting := self.waitlist.remove(event.request_id)) is not None:
            return [self._refuse(waiting, RefusalCode.TIMEOUT, at)] if event.timed_out else []
        if event.timed_out:  # whoever is past waiting for room will be answered soon; the deferred must not start to wait now
            self._deferred = [replace(r, may_wait=False) if r.request_id == event.request_id else r for r in self._deferred]
            return []
        self._deferred = [request for request in self._deferred if request.request_id != event.request_id]
        leaver = next((agent for agent in self.agents.values() if agent.registration == event.request_id), None)
        return self.roster.leave(leaver) if leaver else []

    def _admit_waiting(self, at: float) -> tuple[list[actions.Action], int, ModelId | None]:
        """Book those whose turn it is, in order, up to the first who still does not fit.

        Returns the bytes, too, that turns must leave free, because the first one waits for no more than that they are cleared,
        and its model: turns must leave that where it is.
        """
        todo: list[actions.Action] = []
        for event in (waiting.request for waiting in self.waitlist.in_order(at)):
            model, decision = self.models.get(event.agent.model.id), self.books.decide(event.agent)
            if decision.outcome is Outcome.NEVER_FITS:  # a context like its own was measured since it came
                self.waitlist.remove(event.request_id)
                todo.append(self._refuse(event, RefusalCode.NEVER, at))
                continue
            if model is not None and model.state is ModelState.UNLOADING:
                return todo, 0, None
            if decision.outcome is Outcome.FIT:
                self.waitlist.remove(event.request_id)
                todo += self.roster.book(event, decision, at)
                continue
            if not event.may_wait and decision.outcome is not Outcome.EVICT:  # its room went to somebody else
                self.waitlist.remove(event.request_id)
                todo.append(self._refuse(event, RefusalCode.CAP, at))
                continue
            if decision.outcome is Outcome.EVICT:
                kept = event.agent.model.id
                streamed = model is not None and model.streams and event.agent.service_class is not ServiceClass.BEST_EFFORT
                todo += self.schedule.send_away(kept, at) if streamed else []
                return todo + self._clear(decision.firm_bytes, at, kept=kept), decision.firm_bytes, kept
            return todo + self._refuse_the_hasty(at), 0, None
        return todo, 0, None

    def _refuse_the_hasty(self, at: float) -> list[actions.Action]:
        """Those who may not wait, and whom somebody that has to came before while their room was being cleared."""
        hasty = [waiting.request for waiting in self.waitlist.in_order(at) if not waiting.request.may_wait]
        for event in hasty:
            self.waitlist.remove(event.request_id)
        ahead = {event.request_id: self.waitlist.ahead_of(event.agent.priority, at) for event in hasty}
        return [self._refuse(event, RefusalCode.CAP, at, waiting_ahead=ahead[event.request_id]) for event in hasty]

    def _clear(self, bytes: int, at: float, *, kept: ModelId | None = None) -> list[actions.Action]:
        """Take back what is lent until so many bytes more can be booked beside what is in use; not the weights of `kept`."""
        room = self.books.room()
        missing = room.firm_bytes + room.in_use_bytes + bytes - room.cap_bytes
        return self.schedule.evict(missing, at, busy_too=True, kept_model=kept)

    def _must_wait_for_leavers(self, spec: AgentSpec) -> bool:
        """Whether something of the same name is on its way out: a model being unloaded, or an agent (a restarted one's past)."""
        namesake, model = self.agents.get(spec.id), self.models.get(spec.model.id)
        return (namesake is not None and namesake.stage is Stage.LEAVING) or (
            model is not None and model.state is ModelState.UNLOADING
        )

    def _take_up_deferred(self, at: float) -> list[actions.Action]:
        """Decide on those whose leavers have left, in the order of their arrival."""
        todo: list[actions.Action] = []
        if any(not self._must_wait_for_leavers(event.agent) for event in self._deferred):
            deferred, self._deferred = self._deferred, []
            for event in deferred:
                todo += self._on_register(event, at)
        return todo

    # --- seats --------------------------------------------------------------------------------------------------------

    def _on_seat_taken(self, event: events.SeatTaken, at: float) -> list[actions.Action]:
        return [*self.roster.on_seat_taken(event, at), *self.forks.on_seat_taken(event)]

    def _on_seat_not_taken(self, event: events.SeatNotTaken, at: float) -> list[actions.Action]:
        return [*self.roster.on_seat_not_taken(event, at), *self.forks.on_seat_not_taken(event)]

    # --- the device ---------------------------------------------------------------------------------------------------

    def _on_device_read(self, event: events.DeviceRead, at: float) -> list[actions.Action]:
        """The device says what strangers hold; besides, time has passed: what idles beyond its time is given back."""
        self.books.read_device(event.cap_bytes, event.physical_bytes)
        todo: list[actions.Action] = []
        if (ttl := self.rules.idle_ttl_s) is not None:
            for agent in [agent for agent in self._idle_agents() if at - agent.idle_since >= ttl]:
                todo += self.roster.leave(agent)
        if (shrink := self.rules.idle_shrink_s) is not None:
            surplus = self.books.in_use_bytes - self.books.promise().turn_bytes
            todo += self.schedule.evict(surplus, at, idle_since=at - shrink)
        return todo

    def _idle_agents(self) -> list[Agent]:
        """Those without a turn, waiting or running."""
        in_use = self.rotation.in_use()
        return [agent for id, agent in self.agents.items() if agent.stage is Stage.ADMITTED and id not in in_use]

    def _on_closing(self, event: events.Closing, at: float) -> list[actions.Action]:
        todo: list[actions.Action] = []
        for request in (*(waiting.request for waiting in self.waitlist), *self._deferred):
            self.waitlist.remove(request.request_id)
            todo.append(actions.Refuse(request.request_id, event.error))
        todo += [actions.FailRequest(reserving.request_id, event.error) for reserving in self._reserving]
        self._deferred, self._reserving = [], []
        for agent in list(self.agents.values()):
            if agent.stage is Stage.LOADING:
                todo.append(actions.Refuse(agent.registration, event.error))
            todo += self.roster.leave(agent)
        return todo

    def _give_way(self, at: float) -> list[actions.Action]:
        """Where strangers took what is booked here, what is idle leaves the device until the rest fits under the cap."""
        if self.books.drifts:
            self.books.keep_promise()
        if not self.ledger.overdrawn_bytes:
            return []
        room = self.books.room()
        missing = room.firm_bytes + room.in_use_bytes - room.cap_bytes
        lent = room.in_use_bytes - self.books.promise().turn_bytes
        todo = self.schedule.evict(missing, at, also_wanted=False)
        return todo + self.schedule.evict(min(missing, lent), at, busy_too=True)

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _on_owner_died(self, event: events.OwnerDied, at: float) -> list[actions.Action]:
        """Its registrations are answered too: nobody hears it, but the shell's call would wait for ever."""
        todo: list[actions.Action] = []
        waiting = [waiting.request for waiting in self.waitlist]
        for request in [request for request in (*waiting, *self._deferred) if request.agent.owner == event.owner]:
            todo += self._on_register_abandoned(events.RegisterAbandoned(request.request_id), at)
            todo.append(actions.Refuse(request.request_id, UnknownAgent(request.agent.id)))
        for agent in [agent for agent in self.agents.values() if agent.spec.owner == event.owner]:
            if agent.stage is Stage.LOADING:
                todo.append(actions.Refuse(agent.registration, UnknownAgent(agent.id)))
            todo += self.roster.leave(agent)
        for reserving in [reserving for reserving in self._reserving if reserving.owner == event.owner]:
            self._reserving.remove(reserving)
            todo.append(actions.FailRequest(reserving.request_id, self.refusals.of_bytes(RefusalCode.CAP, reserving.bytes, at)))
        for reservation in self.books.external.of(event.owner):
            self.books.external.release(reservation)
        self._reserved = {request: id for request, id in self._reserved.items() if id in self.books.external}
        return todo

    # --- other tasks' bytes -----------------------------------------------------------------------------------------

    def _on_reserve(self, event: events.ReserveRequested, at: float) -> list[actions.Action]:
        self._reserving.append(event)
        return []

    def _answer_reserving(self, at: float) -> list[actions.Action]:
        """Book what fits beside all that is in use, clear what is idle for what would fit then, refuse the rest."""
        todo: list[actions.Action] = []
        for event in list(self._reserving):
            room, turn_bytes = self.books.room(), self.books.promise().turn_bytes
            left = room.cap_bytes - room.firm_bytes - event.bytes
            if max(turn_bytes, room.in_use_bytes) <= left:
                self._reserving.remove(event)
                self.books.keep_promise()
                reservation = self.books.external.reserve(event.holder, event.bytes, event.owner)
                self._reserved[event.request_id] = reservation
                todo.append(actions.AnswerReserve(event.request_id, reservation))
            elif turn_bytes <= left:
                todo += self._clear(event.bytes, at)
            else:
                self._reserving.remove(event)
                never = event.bytes > room.best_cap_bytes - room.fixed_bytes
                code = RefusalCode.NEVER if never else RefusalCode.CAP
                todo.append(actions.FailRequest(event.request_id, self.refusals.of_bytes(code, event.bytes, at)))
        return todo

    def _on_reserve_abandoned(self, event: events.ReserveAbandoned, at: float) -> list[actions.Action]:
        """Bytes whose id nobody received are given back."""
        self._reserving = [reserving for reserving in self._reserving if reserving.request_id != event.request_id]
        reservation = self._reserved.pop(event.request_id, None)
        if reservation is not None and reservation in self.books.external:
            self.books.external.release(reservation)
        return []

    def _on_release(self, event: events.ReleaseRequested, at: float) -> list[actions.Action]:
        if event.reservation_id not in self.books.external:
            return [actions.FailRequest(event.request_id, UnknownReservation(event.reservation_id))]
        self._reserved = {request: id for request, id in self._reserved.items() if id != event.reservation_id}
        return [actions.AnswerRelease(event.request_id, self.books.external.release(event.reservation_id))]

    # --- derived ----------------------------------------------------------------------------------------------------

    def _is_known(self, agent_id: AgentId) -> bool:
        waiting = [waiting.request for waiting in self.waitlist]
        return agent_id in self.agents or any(request.agent.id == agent_id for request in (*waiting, *self._deferred))

    def check(self) -> None:
        """Raise InternalError unless the books and the records agree."""
        self.books.check()
        self.kv_books.check()
        self.rotation.check()
        self.schedule.check()
        self.roster.check()
