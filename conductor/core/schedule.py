"""Carries out `turns.plan_turns` on the records and the books: takes the picture, takes the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

from conductor.core import actions, events, moment, turns
from conductor.core.books import Books
from conductor.core.ledger import OverCap
from conductor.core.pools import Pool, PoolPhase
from conductor.core.refusals import Refusals
from conductor.core.residency import Model
from conductor.core.rotation import Rotation
from conductor.core.seating import Seating
from conductor.core.sessions import Agent, Phase, Stage, Turn
from conductor.errors import InternalError, RefusalCode
from conductor.types import AgentId, ModelId, ModelState, PoolId, ServiceClass


class Schedule:
    """At most `live_contexts` pools are live beside those of guaranteed agents; None: as many as there is room for."""

    def __init__(
        self,
        agents: Mapping[AgentId, Agent],
        models: Mapping[ModelId, Model],
        pools: Mapping[PoolId, Pool],
        books: Books,
        rotation: Rotation,
        seating: Seating,
        refusals: Refusals,
        *,
        live_contexts: int | None,
        min_turn_s: float,
    ) -> None:
        self._agents, self._models, self._pools = agents, models, pools
        self._books, self._rotation, self._seating, self._refusals = books, rotation, seating, refusals
        self._live_contexts, self._min_turn_s = live_contexts, min_turn_s

    # --- the plan -----------------------------------------------------------------------------------------------------

    def plan(self, at: float, *, held_back_bytes: int, kept_model: ModelId | None = None) -> list[actions.Action]:
        """Start, seat, move and load what the plan says. The weights of `kept_model` are no turn's to send away."""
        waiting = self._rotation.in_order(at)
        if not waiting:
            return self._drain_on()
        for turn in waiting:
            if turn.unbooked:
                self._rotation.grow(turn)
        held_back = held_back_bytes + self._loose_bytes(kept_model)
        picture = self._picture(at, self._books.turn_limit_bytes(held_back_bytes=held_back), kept_model=kept_model)
        steps = turns.plan_turns([self._waiting(turn, at, kept_model) for turn in waiting], picture)
        todo = [action for step in steps for action in self._take(step, at)] + self._drain_on()
        failed = self._fail_expired(at)  # whoever waits behind them has not been planned for
        again = self.plan(at, held_back_bytes=held_back_bytes, kept_model=kept_model) if failed else []
        return todo + failed + again

    def evict(
        self,
        bytes: int,
        at: float,
        *,
        idle_since: float | None = None,
        also_wanted: bool = True,
        busy_too: bool = False,
        kept_model: ModelId | None = None,
    ) -> list[actions.Action]:
        """Send away what is idle, or was idle `idle_since` then, until so many bytes are free or on their way.

        `also_wanted`: if nothing else brings them, also the pools of agents that have a turn waiting; `busy_too`: and then
        those in which turns run.
        """
        wanted = self._rotation.wanted()
        kept = frozenset[AgentId]() if also_wanted else self._about_to_start()
        picture = self._picture(at, 0, idle_since, kept, kept_model)
        steps = turns.plan_eviction(picture, bytes=bytes, last=wanted, busy_too=busy_too)
        return [action for step in steps for action in self._take(step, at)] + self._drain_on()

    def send_away(self, model_id: ModelId, at: float) -> list[actions.Action]:
        """All pools over a model and then its weights, whoever's turn it is: they come back whole."""
        steps = turns.plan_parking(self._picture(at, 0), model_id)
        return [action for step in steps for action in self._take(step, at)] + self._drain_on()

    def _drain_on(self) -> list[actions.Action]:
        todo, running = self._seating.carry_on()
        own = {turn.agent_id: turn for turn in self._rotation.running()}
        return todo + [action for agent in running for action in self._rotation.pause(own[agent.id])]

    def _take(self, step: moment.Step, at: float) -> list[actions.Action]:
        match step:
            case moment.Start(turn_id, agent_id):
                agent = self._agents[agent_id]
                # No further than what is booked for it, however large the pool is: it may have to go on in one of its own.
                room = min(self._pools[agent.pool].context.window, agent.window_in_use)
                return [self._rotation.start(agent, self._rotation.turns[turn_id], room, at)]
            case moment.Take(turn_id, agent_id):
                return [self._seating.take(self._agents[agent_id], turn_id)]
            case moment.Leave(agent_id, for_turn):
                return self._seating.leave(self._agents[agent_id], for_turn)
            case moment.Pause(turn_id):
                return self._rotation.pause(self._rotation.turns[turn_id])
            case moment.Open(_, agent_id):
                return [self._seating.open(self._agents[agent_id], step)]
            case moment.Drain(pool, for_turn):
                self._seating.drain(self._pools[pool], for_turn)
                return []
            case moment.Load(model_id, placement):
                model = self._models[model_id]
                self._books.take_weights(model, placement)
                model.become("load")
                model.at_home |= placement is not None
                return [actions.LoadModel(model.plan, placement)]
            case moment.Park(model_id):
                self._models[model_id].become("unload")
                return [actions.UnloadModel(model_id, keep_home=self._models[model_id].at_home)]

    def _fail_expired(self, at: float) -> list[actions.Action]:
        for turn in self._rotation.waiting():
            turn.expired &= not self._has_its_room(turn)
        expired = [turn for turn in self._rotation.waiting() if turn.expired and not self._is_under_way(turn)]
        heads = self._rotation.heads()
        return [action for turn in expired for action in self._rotation.time_out(turn, self.reason(turn, heads), at)]

    def _has_its_room(self, turn: Turn) -> bool:
        """It outgrew its window, a larger one is booked, and only others' turns come first: what it made is not thrown away."""
        return bool(turn.outgrew) and not turn.unbooked and self._fits(self._agents[turn.agent_id])

    def _fits(self, agent: Agent) -> bool:
        """Whether the agent's pool could be made if all others left: strangers may have taken its room."""
        weights = 0 if self._models[agent.model_id].firm else self._books.prices.least_bytes(agent.spec.model)
        return agent.context_bytes + weights <= self._books.turn_limit_bytes()

    def _is_under_way(self, turn: Turn) -> bool:
        """Whether a seat is being made for this turn, or cleared away for it: a moment, and no waiting for anybody."""
        if turn.unbooked:
            return False
        made = any(pool.turn == turn.id and pool.phase is not PoolPhase.READY for pool in self._pools.values())
        cleared = any(a.seat and a.seat.turn == turn.id and a.phase is Phase.LEAVING for a in self._agents.values())
        return made or cleared or self._agents[turn.agent_id].phase is Phase.TAKING

    # --- pools that were made -------------------------------------------------------------------------------------------

    def on_pool_opened(self, event: events.PoolOpened, at: float) -> list[actions.Action]:
        """If it took more than was booked, and the rest does not fit, its turn is refused, unless fewer slots may do."""
        pool = self._pools[event.pool_id]
        try:
            self._seating.on_opened(event, at)
        except OverCap as excess:
            self._seating.drain(pool, pool.turn)
            turn = self._rotation.turns.get(pool.turn) if pool.turn is not None else None
            if pool.context.slots == 1 and turn is not None:
                return self._rotation.fail(turn, self._refusals.of_bytes(RefusalCode.CAP, excess.requested_bytes))
        return []

    def on_pool_open_failed(self, event: events.PoolOpenFailed, at: float) -> list[actions.Action]:
        pool = self._pools[event.pool_id]
        turn = self._rotation.turns.get(pool.turn) if pool.turn is not None else None
        for_good = self._seating.on_open_failed(pool)
        return self._rotation.fail(turn, event.error) if for_good and turn is not None else []

    def on_seat_not_taken(self, event: events.SeatNotTaken, at: float) -> list[actions.Action]:
        agent = self._agents[event.agent_id]
        turn = self._seating.turn_of(agent)
        agent.become("not taken")
        return [] if turn is None else self._rotation.fail(turn, event.error)

    # --- the picture --------------------------------------------------------------------------------------------------

    def _waiting(self, turn: Turn, at: float, kept_model: ModelId | None) -> moment.WaitingTurn:
        agent = self._agents[turn.agent_id]
        comes_whole = agent.model_id == kept_model and self._models[kept_model].at_home and not self._models[kept_model].placement
        return moment.WaitingTurn(
            id=turn.id,
            agent_id=agent.id,
            model_id=agent.model_id,
            pool=agent.pool,
            shapes=self._seating.shapes(agent),
            window=agent.window_in_use,
            tokens=self._tokens(turn),
            rank=self._rotation.rank(turn, at),
            blocked=turn.unbooked or turn.held or turn.fork is not None or agent.in_motion or comes_whole,
        )

    def _tokens(self, turn: Turn) -> int:
        """That a seat must have room for."""
        return turn.outgrew[0] if turn.outgrew else self._agents[turn.agent_id].tokens

    def _about_to_start(self) -> frozenset[AgentId]:
        """Whose turns wait, and have a pool that is large enough for them."""
        stuck = self._rotation.stuck()
        return frozenset(id for id, turn in self._rotation.heads().items() if id not in stuck and self._suits(turn))

    def _suits(self, turn: Turn) -> bool:
        pool = self._pools.get(self._agents[turn.agent_id].pool)
        return pool is not None and pool.context.window >= self._tokens(turn)

    def _picture(
        self,
        at: float,
        room_bytes: int,
        idle_since: float | None = None,
        kept: frozenset[AgentId] = frozenset(),
        kept_model: ModelId | None = None,
    ) -> moment.Picture:
        running = {turn.agent_id: turn for turn in self._rotation.running()}
        awaited = {self._agents[id].pool for id in kept}
        return moment.Picture(
            sitters=[self._sitter(a, running.get(a.id), at, idle_since, kept) for a in self._agents.values() if a.seat],
            pools={pool.id: self._pool(pool, at, awaited=pool.id in awaited) for pool in self._pools.values()},
            models=self._weights(idle_since, kept_model),
            room_bytes=room_bytes,
            live_contexts=math.inf if self._live_contexts is None else self._live_contexts,
            prospects=self._prospects(),
        )

    def _sitter(
        self, agent: Agent, turn: Turn | None, at: float, idle_since: float | None, kept: frozenset[AgentId]
    ) -> moment.Sitter:
        return moment.Sitter(
            agent_id=agent.id,
            pool=agent.pool,
            phase=_apparent_phase(agent, idle_since, kept),
            last_turn=agent.last_turn,
            best_effort=agent.service_class is ServiceClass.BEST_EFFORT,
            turn_id=turn.id if turn else None,
            rank=self._rotation.rank(turn, at) if turn else (0, 0),
            may_pause=turn is not None and self._rotation.ran_its_minimum(turn, at),
            pausing=turn is not None and (turn.pausing or turn.stopping is not None),
        )

    def _pool(self, pool: Pool, at: float, *, awaited: bool) -> moment.LivePool:
        """One that is not to be emptied now, because a turn is about to start in it, is shown as being made."""
        return moment.LivePool(
            id=pool.id,
            model_id=pool.model_id,
            phase=PoolPhase.OPENING if awaited and pool.phase is PoolPhase.READY else pool.phase,
            bytes=self._books.ledger.size(pool.reservation),
            window=pool.context.window,
            slots=pool.context.slots,
            shapes=pool.shapes,
            guaranteed=pool.owner is not None,
            settled=at - pool.ready_since >= self._min_turn_s,
        )

    def _prospects(self) -> dict[PoolId, moment.Prospect]:
        found: dict[PoolId, moment.Prospect] = {}
        for agent in self._agents.values():
            if agent.guaranteed or agent.stage is not Stage.ADMITTED:
                continue
            known, bytes = found.get(agent.pool, moment.Prospect(0)), agent.context_bytes + self._absent_bytes(agent)
            found[agent.pool] = moment.Prospect(known.agents + 1, max(known.bytes, bytes))
        return found

    def _absent_bytes(self, agent: Agent) -> int:
        """Weights that would have to be loaded into the room for turns."""
        model = self._models[agent.model_id]
        absent = not model.firm and model.state in (ModelState.PARKED, ModelState.UNLOADING)
        return self._books.prices.least_bytes(model.plan) if absent else 0

    def _loose_bytes(self, model_id: ModelId | None) -> int:
        """What the model's weights take of the room for turns."""
        model = self._models.get(model_id) if model_id is not None else None
        return self._books.prices.held_bytes(model) if model and not model.firm else 0

    def _weights(self, idle_since: float | None = None, kept: ModelId | None = None) -> dict[ModelId, moment.Weights]:
        loose: dict[ModelId, list[Agent]] = {id: [] for id, model in self._models.items() if not model.firm}
        for agent in self._agents.values() if loose else ():
            if agent.model_id in loose:
                loose[agent.model_id].append(agent)
        return {
            id: moment.Weights(
                model_id=id,
                state=model.state,
                bytes=self._books.prices.held_bytes(model) or self._books.prices.weights_bytes(model.plan),
                firm=model.firm or id == kept or not all(_rested(agent, idle_since) for agent in loose[id]),
                last_turn=0 if model.firm else max((agent.last_turn for agent in loose[id]), default=0),
                offers=() if model.firm else model.offers,
                placement=model.placement,
                step_s=self._books.homes.step_s(model),
            )
            for id, model in self._models.items()
        }

    # --- derived ------------------------------------------------------------------------------------------------------

    @property
    def live_contexts(self) -> int | None:
        return self._live_contexts

    def reason(self, turn: Turn, heads: Mapping[AgentId, Turn]) -> str:
        """What a waiting turn waits for. `heads`: each agent's first that waits."""
        agent = self._agents[turn.agent_id]
        pool = self._pools.get(agent.pool)
        if turn.unbooked:
            return f"room for a window of {(turn.outgrew or (0,))[0]} tokens"
        if turn.held:
            return "its reader"
        if heads[agent.id] is not turn or agent.phase is Phase.BUSY:
            return "an earlier turn of the same agent"
        if agent.phase is Phase.TAKING or (pool is not None and pool.phase is PoolPhase.OPENING):
            return "its seat is being made"
        if agent.seat is not None or agent.in_motion:
            return "its KV is on its way"
        if self._models[agent.model_id].state is ModelState.LOADING:
            return "its model is being loaded"
        if pool is not None and pool.phase is PoolPhase.READY and pool.context.window >= agent.tokens:
            return f"a seat of its model: all {pool.context.slots} are taken" if pool.context.slots > 1 else "its model's seat"
        if not self._fits(agent):
            return "other programs took memory of this device"
        return "turns of others to end"

    def check(self) -> None:
        """Raise InternalError unless pools and seats agree."""
        turning = [pool for pool in self._pools.values() if pool.owner is None]
        if self._live_contexts is not None and len(turning) > self._live_contexts:
            raise InternalError(f"{len(turning)} live pools, {self._live_contexts} allowed")
        taken: dict[PoolId, int] = {}
        for agent in self._agents.values():
            if agent.seat is not None:
                if agent.seat.pool not in self._pools or agent.seat.pool != agent.pool:
                    raise InternalError(f"{agent.id} sits in a pool that is not its own")
                taken[agent.pool] = taken.get(agent.pool, 0) + 1
        for id, count in taken.items():
            pool = self._pools[id]
            if count > pool.context.slots or pool.phase in (PoolPhase.OPENING, PoolPhase.CLOSING):
                raise InternalError(f"{count} agents sit in the {pool.context.slots} slots of {id}, which is {pool.phase.value}")


def _apparent_phase(agent: Agent, idle_since: float | None, kept: frozenset[AgentId]) -> Phase:
    """A ready seat that is not to be left now is shown as busy."""
    phase = agent.phase or Phase.LEAVING
    return Phase.BUSY if phase is Phase.READY and (agent.id in kept or not _rested(agent, idle_since)) else phase


def _rested(agent: Agent, idle_since: float | None) -> bool:
    """Whether it may be sent away as far as `idle_since` says; without one, always."""
    return idle_since is None or (agent.phase in (None, Phase.READY) and agent.idle_since <= idle_since)
