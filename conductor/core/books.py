"""The ledger and the promise together: what admissions cost, and that the promise stays booked.

Three kinds of lines. What is *fixed*: the process's overhead. What is *firm*: weights that stay, guaranteed windows,
other tasks' bytes. And one *room for turns*: a reservation of headroom that live pools, and the weights of models
that only best-effort agents use, take their bytes out of and return them to. It is never smaller than the promise
(`admission.promise`), so a turn can always be had by waiting for others to end; while memory is free it may be larger,
so that more than one pool is live, with more than one slot, and what is lent of it is given back as soon as somebody needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from conductor.core import admission
from conductor.core.admission import Decision, Outcome, Promise, Room
from conductor.core.events import AgentSpec, Rung
from conductor.core.external import External
from conductor.core.homes import Homes
from conductor.core.ledger import Ledger, OverCap
from conductor.core.pools import Pool, PoolPhase
from conductor.core.prices import Prices
from conductor.core.residency import Model
from conductor.core.sessions import Agent, Phase
from conductor.core.streaming import Placement, ring_bytes
from conductor.errors import InternalError
from conductor.types import AgentId, ContextSpec, Kind, ModelId, ModelState, PoolId, ReservationId, ServiceClass


class Books:
    """Who is in is the caller's knowledge (`agents`, `models`: shared and read only); what it costs is `prices`'."""

    def __init__(
        self,
        ledger: Ledger,
        agents: Mapping[AgentId, Agent],
        models: Mapping[ModelId, Model],
        pools: Mapping[PoolId, Pool],
        *,
        home_bytes: int = 0,
        link_bytes_per_s: float = 1.0,
    ) -> None:
        self.ledger = ledger
        self._agents, self._models, self._pools = agents, models, pools
        self._headroom = ledger.reserve("conductor", Kind.HEADROOM, 0)
        self._overhead: list[ReservationId] = []
        self.best_cap_bytes = ledger.cap_bytes
        self._promised: Promise | None = None
        #: the most that can be held at all, whatever may be booked
        self.physical_bytes = ledger.cap_bytes
        self.homes = Homes(home_bytes, link_bytes_per_s=link_bytes_per_s)
        self.prices = Prices(ledger, models, self.homes)
        self.external = External(ledger)

    # --- the promise --------------------------------------------------------------------------------------------------

    def promise(self) -> Promise:
        """What the agents were promised. Kept until `_forget_promise`: a turn among a thousand agents asks for it often."""
        if self._promised is None:
            self._promised = self._promise_anew()
        return self._promised

    def _promise_anew(self) -> Promise:
        return admission.promise(map(self.prices.tenant, self._agents.values()))

    def _forget_promise(self) -> None:
        """An agent came or went, its window in use changed, or what something costs."""
        self._promised = None

    # --- the device ---------------------------------------------------------------------------------------------------

    def book_overhead(self, holder: str, bytes: int) -> None:
        """Book what the process itself holds on the device, for as long as it lives. Raises OverCap."""
        self._overhead.append(self.ledger.reserve(holder, Kind.OVERHEAD, bytes))

    @property
    def overhead_bytes(self) -> int:
        return sum(map(self.ledger.size, self._overhead))

    def read_device(self, cap_bytes: int, physical_bytes: int) -> None:
        self.physical_bytes = physical_bytes
        self.ledger.set_cap(cap_bytes)
        self.best_cap_bytes = max(self.best_cap_bytes, cap_bytes)
        self.keep_promise()

    @property
    def drifts(self) -> bool:
        """Whether strangers hold more than they did at the start."""
        return self.ledger.cap_bytes < self.best_cap_bytes

    def room(self) -> Room:
        return Room(
            cap_bytes=self.ledger.cap_bytes,
            best_cap_bytes=self.best_cap_bytes,
            fixed_bytes=self.overhead_bytes,
            firm_bytes=self._firm_bytes,
            turn_room_bytes=self._turn_room_bytes,
            in_use_bytes=self.in_use_bytes,
        )

    @property
    def _turn_room_bytes(self) -> int:
        return self.ledger.size(self._headroom) + self.in_use_bytes

    @property
    def _firm_bytes(self) -> int:
        """Everything booked but the room for turns."""
        return self.ledger.allocated_bytes - self._turn_room_bytes

    @property
    def in_use_bytes(self) -> int:
        """Of the room for turns: live pools, and weights that only best-effort agents use."""
        return self.ledger.parts_bytes(self._headroom)

    def idle_bytes(self, *, kept: ModelId | None = None) -> int:
        """Of what is in use, what is leaving or could leave without anybody's turn standing still; not the weights of `kept`."""
        turning = [pool for pool in self._pools.values() if pool.owner is None]
        used = {a.seat.pool for a in self._agents.values() if a.seat and a.phase in (Phase.TAKING, Phase.BUSY)}
        used |= {pool.id for pool in turning if pool.phase is PoolPhase.OPENING}
        idle = [pool.reservation for pool in turning if pool.id not in used]
        held = {pool.model_id for pool in turning if pool.id in used}
        loose = [model for id, model in self._models.items() if not model.firm and id not in held and id != kept]
        weights = (self.prices.held_bytes(model) for model in loose if model.state is not ModelState.LOADING)
        return sum(map(self.ledger.size, idle)) + sum(weights)

    @property
    def evictable_bytes(self) -> int:
        """What would be booked less if everything idle left."""
        return self._turn_room_bytes - max(self._turn_target_bytes(), self.in_use_bytes - self.idle_bytes())

    def turn_limit_bytes(self, *, held_back_bytes: int = 0) -> int:
        """How large the room for turns may become now.

        `held_back_bytes` are for somebody whose admission waits for them. If strangers took what is booked here, those
        admitted may still use what was booked for them as far as the device has it: nobody is dropped.
        """
        firm = self._firm_bytes
        if self.ledger.overdrawn_bytes:
            return min(self._turn_room_bytes, self.physical_bytes - firm)
        return self.ledger.cap_bytes - firm - held_back_bytes

    def keep_promise(self) -> None:
        """Size the room for turns to the promise, or to what is in use if that is more. Raises OverCap."""
        self._size_room(max(self._turn_target_bytes(), self.in_use_bytes))

    def _make_way(self) -> None:
        """`keep_promise` as far as it only shrinks."""
        self._size_room(min(self._turn_room_bytes, max(self._turn_target_bytes(), self.in_use_bytes)))

    def _turn_target_bytes(self) -> int:
        """The promised turn. Where strangers took its room, best-effort agents give way first."""
        promise = self.promise()
        return promise.turn_bytes if self._promise_fits() else promise.shared_turn_bytes

    def _size_room(self, bytes: int) -> None:
        self.ledger.resize(self._headroom, bytes - self.in_use_bytes)

    # --- admission --------------------------------------------------------------------------------------------------

    def decide(self, spec: AgentSpec, *, room: Room | None = None) -> Decision:
        """Decide on a newcomer; in another `room` than there is, if given."""
        newcomer, model, promised = self.prices.newcomer(spec), self._models.get(spec.model.id), self.promise()
        before = promised
        if model is not None and model.firm and model.plan.id not in promised.weights:  # its users left while it is loaded
            before = replace(promised, weights={**promised.weights, model.plan.id: self.prices.weights_bytes(model.plan)})
        becomes_firm = model is not None and not model.firm and spec.service_class is not ServiceClass.BEST_EFFORT
        streams = becomes_firm and model is not None and model.streams
        moved = self.prices.held_bytes(model) if becomes_firm and model is not None and not streams else 0
        decision = admission.decide(
            room or self.room(),
            before=before,
            after=promised.plus(newcomer),
            alone=Promise().plus(newcomer),
            moved_bytes=moved,
        )
        if streams and decision.outcome is Outcome.FIT:  # once that part of the weights has left
            return replace(decision, outcome=Outcome.EVICT)
        return decision

    def admit(self, agent: Agent, model: Model) -> None:
        """Book an admission that was decided to FIT. `agent` and `model` are in the records already."""
        if self._promised is not None:
            self._promised = self._promised.plus(self.prices.tenant(agent))
        if agent.service_class is not ServiceClass.BEST_EFFORT and not model.firm:
            self._make_firm(model)
        self._loosen(model)
        self._make_way()
        if agent.guaranteed:
            agent.guarantee = self.ledger.reserve(agent.id, Kind.HEADROOM, agent.context_bytes)
        self.keep_promise()

    def dismiss(self, agent: Agent, model: Model) -> None:
        """Undo `admit`; the agent is out of the records already."""
        self._forget_promise()
        if agent.guarantee is not None:
            self.ledger.release(agent.guarantee)
        self._loosen(model)
        self.keep_promise()

    def grow(self, agent: Agent, rung: int) -> bool:
        """Promise the agent a larger window, and book it; False, with nothing changed, if it does not fit.

        Where strangers took the room of best-effort agents' turns, these are in no shared agent's way.
        """
        kept = self._promise_fits()
        before, agent.rung = agent.rung, rung
        self._forget_promise()
        if self._promise_is_broken(kept) or not (self._promise_fits() or self._shared_promise_fits(agent)):
            agent.rung = before
            self._forget_promise()
            return False
        self.keep_promise()
        return True

    def settle(self, agent: Agent) -> None:
        """Give back what of the agent's window its conversation does not need."""
        before = agent.rung
        agent.settle()
        if agent.rung != before:
            self._forget_promise()
            self.keep_promise()

    # --- weights ------------------------------------------------------------------------------------------------------

    def _make_firm(self, model: Model) -> None:
        """From now on the weights stay: booked for themselves, not in the room for turns."""
        model.firm = True
        if model.reservation is None:
            self._make_way()
            model.reservation = self.ledger.reserve(model.plan.key, Kind.WEIGHTS, self.prices.weights_bytes(model.plan))
        else:
            self.ledger.detach(model.reservation)

    def _loosen(self, model: Model) -> None:
        """Where only best-effort agents use a model, its weights may leave the device while they are idle."""
        users = {agent.service_class for agent in self._agents.values() if agent.model_id == model.plan.id}
        if users != {ServiceClass.BEST_EFFORT}:
            return
        if self.homes.settle(model):
            self._forget_promise()
        if model.firm:
            model.firm = False
            if model.reservation is not None:
                self.ledger.attach(model.reservation, self._headroom)

    def take_weights(self, model: Model, placement: Placement | None) -> None:
        """Hand a model that is not firm its bytes out of the room for turns, which grows if it must. Raises OverCap."""
        offer = next((offer for offer in model.offers if offer.placement == placement), None)
        blocks = model.plan.blocks
        ring = ring_bytes(blocks, placement) if blocks is not None and placement is not None else 0
        bytes = offer.bytes if offer else self.prices.weights_bytes(model.plan)
        self._provide(bytes)
        model.placement = placement
        model.reservation = self.ledger.split(self._headroom, model.plan.key, Kind.WEIGHTS, bytes - ring)
        model.ring = self.ledger.split(self._headroom, model.plan.key, Kind.RING, ring) if ring else None

    def stay_whole(self, model: Model) -> None:
        """It turned out that its weights do not move. Raises OverCap, unchanged, if the promise does not fit with all of them."""
        fitted, offered = self._promise_fits(), model.offers
        model.offers = ()
        self._forget_promise()
        if self._promise_is_broken(fitted):
            model.offers = offered
            self._forget_promise()
            raise OverCap(self.prices.weights_bytes(model.plan) - offered[0].bytes, self.ledger.free_bytes)
        self.homes.leave(model)
        model.placement, model.stays_whole = None, True

    def correct_weights(self, model: Model, measured: int) -> None:
        """Book what the weights really took. Raises OverCap, unchanged, if the promise does not fit beside them."""
        fitted = self._promise_fits()
        measured -= self.ledger.size(model.ring) if model.ring else 0
        before = self._resize_weights(model, measured)
        if self._promise_is_broken(fitted):
            self._resize_weights(model, before)
            raise OverCap(measured - before, self.ledger.free_bytes)
        if not model.streams:
            model.measured_bytes = measured
        self.keep_promise()

    def _resize_weights(self, model: Model, bytes: int) -> int:
        """Returns the bytes before. Raises OverCap, unchanged."""
        if model.reservation is None:
            raise InternalError(f"weights of {model.plan.key} without a reservation")
        before = self.ledger.size(model.reservation)
        if model.firm:
            self.ledger.resize(model.reservation, bytes)
        else:
            model.reservation = self._correct_part(model.reservation, bytes)
        self._forget_promise()
        return before

    def _promise_is_broken(self, fitted: bool) -> bool:
        """Whether it fits no more, though it did; or would not even if the strangers left."""
        could_fit = self._firm_bytes + self.promise().turn_bytes <= self.best_cap_bytes
        return (fitted and not self._promise_fits()) or not could_fit

    def _shared_promise_fits(self, agent: Agent) -> bool:
        shared = agent.service_class is ServiceClass.SHARED
        return shared and self._firm_bytes + self.promise().shared_turn_bytes <= self.ledger.cap_bytes

    def _promise_fits(self) -> bool:
        return self._firm_bytes + self.promise().turn_bytes <= self.ledger.cap_bytes

    def release_weights(self, model: Model) -> None:
        if model.reservation is None:
            raise InternalError(f"weights of {model.plan.key} released twice")
        (self.ledger.release if model.firm else self.ledger.join)(model.reservation)
        if model.ring is not None:
            self.ledger.join(model.ring)
        model.reservation, model.ring, model.placement, model.firm = None, None, None, False
        self._forget_promise()

    # --- pools --------------------------------------------------------------------------------------------------------

    def take(self, agent: Agent, bytes: int) -> ReservationId:
        """Hand a pool its bytes: the agent's own if they are guaranteed, else out of the room for turns. Raises OverCap."""
        if agent.guarantee is not None:
            return self.ledger.split(agent.guarantee, agent.id, Kind.CONTEXT, bytes)
        self._provide(bytes)
        return self.ledger.split(self._headroom, agent.spec.model.key, Kind.CONTEXT, bytes)

    def give_back(self, pool: Pool) -> None:
        self.ledger.join(pool.reservation)

    def _provide(self, bytes: int) -> None:
        """Let the room for turns have so many bytes that nobody uses. Raises OverCap."""
        if bytes > self.ledger.size(self._headroom):
            self.ledger.resize(self._headroom, bytes)

    def correct(self, pool: Pool, measured: int) -> None:
        """Book what the pool really took and price the same parameters so from now on. Raises OverCap, unchanged.

        Where more slots than one took too much, the price is kept: the next pool is made with fewer.
        """
        owner = self._agents.get(pool.owner) if pool.owner is not None else None
        if owner is not None:
            self.ledger.resize(pool.reservation, measured)
            owner.ladder[-1] = Rung(pool.context.window, measured)
            self._forget_promise()
            return
        before, fitted = self.ledger.size(pool.reservation), self._promise_fits()
        key = (pool.model_id, pool.context)
        self._reprice(key, measured)
        try:
            if self._promise_is_broken(fitted):
                raise OverCap(measured - before, self.ledger.free_bytes)
            pool.reservation = self._correct_part(pool.reservation, measured)
        except OverCap:
            if pool.context.slots == 1:
                self._reprice(key, before)
            raise
        self.keep_promise()

    def _correct_part(self, part: ReservationId, measured: int) -> ReservationId:
        """Give a part of the room for turns another size, out of what nobody uses of it as far as possible.

        Raises OverCap, unchanged. The part is returned and taken anew: what it had is not free for a moment, not even
        where strangers hold more than there is.
        """
        before = self.ledger.get(part)
        self._provide(max(0, measured - before.bytes))
        self.ledger.join(part)
        return self.ledger.split(self._headroom, before.holder, before.kind, measured)

    def _guaranteed_bytes(self, agent: Agent) -> int:
        """Booked for the agent alone, its pool included."""
        pool = self._pools.get(agent.pool)
        return (self.ledger.size(agent.guarantee) if agent.guarantee else 0) + (self.ledger.size(pool.reservation) if pool else 0)

    def _reprice(self, key: tuple[ModelId, ContextSpec], bytes: int) -> None:
        self.prices.reprice(key, bytes, self._agents.values())
        self._forget_promise()

    # --- invariants -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise InternalError unless every booked byte is accounted for by overhead, models, promises or an outsider."""
        self.ledger.check()
        self.homes.check(self._models.values())
        if self.promise() != self._promise_anew():
            raise InternalError("the promise changed, and was not looked at again")
        room = self._turn_room_bytes
        if room < (least := self._turn_target_bytes()):
            raise InternalError(f"{room} bytes of room for turns, {least} promised")
        for agent in self._agents.values():
            if agent.guaranteed != (agent.guarantee is not None) or (
                agent.guaranteed and self._guaranteed_bytes(agent) != agent.context_bytes
            ):
                raise InternalError(f"the guarantee of {agent.id} is not what it costs")
        firm = [model.reservation for model in self._models.values() if model.firm and model.reservation]
        guaranteed = sum(self._guaranteed_bytes(agent) for agent in self._agents.values() if agent.guaranteed)
        known = sum(map(self.ledger.size, (*firm, *self.external))) + self.overhead_bytes + guaranteed + room
        if known != self.ledger.allocated_bytes:
            raise InternalError(f"{self.ledger.allocated_bytes} bytes booked, {known} accounted for")
