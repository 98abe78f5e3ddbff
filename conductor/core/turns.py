"""Whose turn is next, and what has to leave the device for it: a pure decision over a picture of the moment.

Turns come in order of precedence. For each waiting turn:

1. its agent has a seat, ready and with room enough: start it;
2. its agent has a seat with too little room: empty the pool, to be made anew with a larger window;
3. its agent's seat is on its way, in or out, or busy: wait;
4. its pool has a seat free: take it; one becoming free: wait for it; else, if memory is idle for more seats and agents are
   there for them, empty the pool, to be made anew with more; else the idle one used longest ago gives way; else the running
   turn of the lowest rank, if it ranks lower and ran its minimum, stands still;
5. a pool for it would not fit even if all others left (strangers took the room): wait, without holding anybody up;
6. its model's weights are on their way: wait for them, with the room that the pool needs kept for it;
7. a place and the bytes are free: load the weights if they are parked, else open a pool;
8. places or bytes are becoming free: wait for them;
9. send away what is idle: best-effort agents' pools and weights first, those used longest ago first among equals; then what
   is busy with turns that all rank lower and ran their minimum; until they have, nobody behind starts there: turns that come
   and go one by one would keep it busy for ever;
10. otherwise wait for turns to end. What was freed so far is kept: nobody behind takes it.

Of weights that have a home in host memory a part is enough (`placing`): (11) what is idle and best effort gives way to as much
of them as is worth having, all else only to the least that a turn can do with; (12) once a pool is idle, another part is brought
if that makes many more tokens: more layers where memory became free, fewer where more agents came.

A pool that others' turns could go on in is not emptied before it has been there for the minimum turn (`settled`): moving
caches back and forth serves nobody. Guaranteed agents have pools of their own, which are always there: they only ever meet
rules 1 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from conductor.core.clearing import Clearing
from conductor.core.moment import (
    FIRST,
    Drain,
    Leave,
    LivePool,
    Load,
    Open,
    Park,
    Pause,
    Picture,
    Sitter,
    Start,
    Step,
    Take,
    WaitingTurn,
    Weights,
)
from conductor.core.placing import WORTH_MOVING, Choice, choose, speed_of
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Phase
from conductor.types import AgentId, ModelId, ModelState, PoolId


def plan_turns(waiting: Sequence[WaitingTurn], picture: Picture) -> list[Step]:
    """The steps to take now, `waiting` being in order of precedence. The numbers are those of the module's list."""
    first: dict[AgentId, WaitingTurn] = {}
    for turn in waiting:
        first.setdefault(turn.agent_id, turn)
    heads = [turn for turn in first.values() if not turn.blocked]
    plan = _Plan(picture, heads)
    for turn in heads:
        plan.serve(turn)
    return plan.steps


def plan_eviction(picture: Picture, *, bytes: int, last: frozenset[AgentId] = frozenset(), busy_too: bool = False) -> list[Step]:
    """Empty idle pools and park idle weights until so many bytes are on their way out; pools of `last` only if need be.

    `busy_too`: and if all that is idle does not bring them, those in which turns run, which stand still for it.
    """
    plan = _Plan(picture, ())
    missing = plan.evict(bytes - plan.coming_bytes, for_turn=None, last=last)
    if busy_too and missing > 0:
        plan.displace(missing, plan.busy_pools(), for_turn=None)
    return plan.steps


def plan_parking(picture: Picture, model_id: ModelId) -> list[Step]:
    """Empty the model's pools, and park its weights once there is none."""
    pools = [pool for pool in picture.pools.values() if pool.model_id == model_id]
    if not pools:
        return [Park(model_id)] if picture.models[model_id].state is ModelState.RESIDENT else []
    return [Drain(pool.id, None) for pool in pools if pool.phase is PoolPhase.READY]


class _Plan(Clearing):
    # --- a turn -------------------------------------------------------------------------------------------------------

    def serve(self, turn: WaitingTurn) -> None:
        own = self._own.get(turn.agent_id)
        if own is not None and own.pool in self._guaranteed:
            if own.phase is Phase.READY:  # (1)
                self.steps.append(Start(turn.id, turn.agent_id))
            return
        pool = self._pools.get(turn.pool)
        if own is not None and own.agent_id not in self._idle and (pool is None or pool.id not in self._gone):  # (3)
            return
        if pool is None:
            self._make_pool(turn, comes=False)
        elif pool.id in self._gone:
            self._make_pool(turn, comes=True)
        elif pool.id in self._awaited:  # (9)
            return
        elif pool.phase is PoolPhase.READY and pool.window < turn.tokens:  # (2)
            self._rebuild(pool, turn)
        elif pool.phase is PoolPhase.READY and self._may_replace(pool, turn):  # (12)
            self.drain(pool, turn.id)
            self._make_pool(turn, comes=True)
        elif own is not None:  # (1)
            del self._idle[own.agent_id]
            self._expect(pool)
            self.steps.append(Start(turn.id, turn.agent_id))
        elif pool.phase is PoolPhase.READY:
            self._find_seat(pool, turn)

    def _find_seat(self, pool: LivePool, turn: WaitingTurn) -> None:
        """(4)"""
        idle = [sitter for sitter in self._sitters[pool.id] if sitter.agent_id in self._idle]
        if self._free_seats[pool.id] > 0:
            self._free_seats[pool.id] -= 1
            self.steps.append(Take(turn.id, turn.agent_id))
        elif self._coming_seats[pool.id] > 0:
            self._coming_seats[pool.id] -= 1
        elif self._may_widen(pool, turn):
            self.drain(pool, turn.id)
            self._make_pool(turn, comes=True)
            return
        elif idle:
            leaver = min(idle, key=self._gives_way)
            del self._idle[leaver.agent_id]
            self.steps.append(Leave(leaver.agent_id, turn.id))
        elif (lowest := self._lowest_below(pool, turn)) is not None and lowest.turn_id is not None:
            self._sitters[pool.id].remove(lowest)
            self.steps.append(Pause(lowest.turn_id))
        else:
            return
        self._expect(pool)

    def _expect(self, pool: LivePool) -> None:
        self._in_use.add(pool.id)
        self._expecting.add(pool.id)

    def _gives_way(self, sitter: Sitter) -> tuple[bool, bool, int]:
        wanted = sitter.agent_id in {turn.agent_id for turn in self._heads}
        return wanted, not sitter.best_effort, sitter.last_turn

    def _lowest_below(self, pool: LivePool, turn: WaitingTurn) -> Sitter | None:
        """The running turn of the lowest rank that may stand still for this one."""
        running = [s for s in self._sitters[pool.id] if s.phase is Phase.BUSY and s.may_pause and not s.pausing]
        below = [sitter for sitter in running if sitter.rank > turn.rank]
        return max(below, key=lambda sitter: sitter.rank, default=None)

    def _may_widen(self, pool: LivePool, turn: WaitingTurn) -> bool:
        """Whether there are more agents than seats, and idle memory for more seats."""
        agents = self._prospects[pool.id].agents if pool.id in self._prospects else 0
        left = self.free_bytes + pool.bytes - self._kept_for_others(pool.id)
        wider = any(slots > pool.slots and bytes <= left for slots, bytes in pool.shapes)
        return pool.slots < agents and wider and self._may_rebuild(pool, turn)

    def _rebuild(self, pool: LivePool, turn: WaitingTurn) -> None:
        if self._alone_too_large(turn):  # (5)
            return
        if not self._may_rebuild(pool, turn):
            self._awaited |= {pool.id} if self._may_rebuild(pool, turn, soon=True) else set()
            return
        self._under_pools.pop(pool.model_id, None)  # its weights stay
        self.drain(pool, turn.id)
        self._make_pool(turn, comes=True)

    def _may_rebuild(self, pool: LivePool, turn: WaitingTurn, *, soon: bool = False) -> bool:
        """Whose turns run in it go on in the new one, if there is memory for all of them; else those of lower rank wait."""
        if pool.id not in self._in_use:
            others = (other for other in self._heads if other.pool == pool.id and other is not turn)
            return pool.settled or not any(other.tokens <= pool.window for other in others)
        fitting = any(slots >= pool.slots and bytes <= self.free_bytes + pool.bytes for slots, bytes in turn.shapes)
        return pool in self.busy_pools(below=FIRST if fitting else turn.rank, soon=soon)

    # --- a pool -------------------------------------------------------------------------------------------------------

    def _alone_too_large(self, turn: WaitingTurn) -> bool:
        model = self._models[turn.model_id]
        return turn.shapes[0][1] + (0 if model.firm else model.least_bytes) > self._room_bytes

    def _make_pool(self, turn: WaitingTurn, *, comes: bool) -> None:
        """Load, open, or see to it that there will be room. `comes`: the pool's place is being cleared already."""
        if turn.pool in self._claimed or self._alone_too_large(turn):  # (5)
            return
        model = self._models[turn.model_id]
        self._claimed.add(turn.pool)
        self._idle_weights.pop(turn.model_id, None)
        self._under_pools.pop(turn.model_id, None)
        if comes:
            self._coming_places -= 1
        is_first = turn.model_id not in self._fetched  # of those that the model's weights are loaded for, if they must be
        if is_first and self._should_move(turn, model):  # (12)
            self.park(turn.model_id)
            self.coming_bytes += model.bytes
        needed = self._needs(turn)
        self._fetched.add(turn.model_id)
        has_place = not comes and self._find_place(turn)
        has_bytes = needed <= self.free_bytes
        if not has_bytes:  # (8), (9)
            self.clear(needed - self.free_bytes - self.coming_bytes, turn)
        self.free_bytes -= needed  # (6), (10)
        if has_bytes and model.state is ModelState.PARKED and is_first:  # (7)
            self._load(turn, model, needed)
        elif has_bytes and has_place and model.state is ModelState.RESIDENT and turn.model_id not in self._parked:  # (7)
            self._open(turn)

    def _needs(self, turn: WaitingTurn) -> int:
        """Bytes of the room for turns that the turn will take, beyond what its model has of it already."""
        model, pool_bytes = self._models[turn.model_id], turn.shapes[0][1]
        leaves = model.state in (ModelState.PARKED, ModelState.UNLOADING) or turn.model_id in self._parked
        absent = leaves and turn.model_id not in self._fetched
        if not absent:
            return pool_bytes
        if model.offers:  # (11)
            wanted = self._wanted(turn, model, self._room_bytes)
            missing = wanted - self.free_bytes - self.coming_bytes
            self.evict(missing, for_turn=turn.id, best_effort_only=True)  # nobody's promise gives way to what is lent
        return self._wanted(turn, model, self.free_bytes + self.coming_bytes)

    # --- how much of the weights ----------------------------------------------------------------------------------------

    def _best(self, turn: WaitingTurn, model: Weights, budget_bytes: int) -> Choice | None:
        """Of weights that have a home, the part to be had with the turn's pool; None of others, and if no part fits."""
        if not model.offers:
            return None
        asked = (turn.pool, turn.shapes, budget_bytes)
        if asked not in self._choices:  # hundreds may wait for the same pool
            agents, step_s = self._agents[turn.pool], model.step_s
            found = choose(model.offers, _prices(turn), budget_bytes=budget_bytes, agents=agents, step_s=step_s)
            self._choices[asked] = found
        return self._choices[asked]

    def _wanted(self, turn: WaitingTurn, model: Weights, free_bytes: int) -> int:
        """What a pool for the turn and its model's weights together take: no more than is free, if that will do."""
        pool_bytes = turn.shapes[0][1]
        alone = self._best(turn, model, self._room_bytes)
        wanted = alone.offer.bytes if alone else model.least_bytes
        return max(pool_bytes + model.least_bytes, min(pool_bytes + wanted, free_bytes))

    def _best_of(self, turn: WaitingTurn, model: Weights, free_bytes: int) -> Choice | None:
        """Of what is free, and idle memory beyond what others may ask for."""
        kept = self._wanted(turn, model, free_bytes)
        return self._best(turn, model, kept + max(0, free_bytes - kept - self._kept_for_others(turn.pool)))

    def _load(self, turn: WaitingTurn, model: Weights, kept_bytes: int) -> None:
        """(7) `kept_bytes` are kept for the turn. Of weights that have a home, what those and idle memory are best for."""
        best = self._best_of(turn, model, kept_bytes + self.free_bytes)
        if best is not None:
            self.free_bytes += kept_bytes - best.offer.bytes - dict(_prices(turn))[best.slots]
        self.steps.append(Load(turn.model_id, best.offer.placement if best else None))

    def _may_replace(self, pool: LivePool, turn: WaitingTurn) -> bool:
        """Whether another part of the weights is worth its coming once the pool is gone, and the pool may be emptied for that."""
        model, agents = self._models[turn.model_id], self._agents[pool.id]
        offer, over = model.offer, [it for it in self._pools.values() if it.model_id == turn.model_id]
        # Under another pool the weights would have to stay.
        if offer is None or len(over) > 1 or (not offer.placement.streams and pool.slots >= agents):
            return False
        now = speed_of(offer, slots=pool.slots, agents=agents, step_s=model.step_s)
        return self._may_rebuild(pool, turn) and self._is_worth_moving(turn, model, self.free_bytes + pool.bytes, now=now)

    def _should_move(self, turn: WaitingTurn, model: Weights) -> bool:
        """Whether weights that no pool is over are worth being brought in another part than they are."""
        over = any(pool.model_id == turn.model_id for pool in self._pools.values())
        return not over and turn.model_id not in self._parked and self._is_worth_moving(turn, model, self.free_bytes)

    def _is_worth_moving(self, turn: WaitingTurn, model: Weights, free_bytes: int, *, now: float = 0) -> bool:
        """Whether another part at its best beats this one at its own, and what is there `now`.

        It has to say so after a pool was emptied for it as well as before: else that went for nothing, and again and again.
        """
        offer, free, agents = model.offer, free_bytes + model.bytes, self._agents[turn.pool]
        if model.firm or offer is None:
            return False
        best = self._best_of(turn, model, free)
        stays = choose([offer], _prices(turn), budget_bytes=free, agents=agents, step_s=model.step_s)
        if best is None or best.offer == offer:
            return False
        return best.tokens_per_s >= WORTH_MOVING * max(now, stays.tokens_per_s if stays else 0)

    # --- seats of a pool --------------------------------------------------------------------------------------------------

    def _open(self, turn: WaitingTurn) -> None:
        """With the shape that serves most of those who wait for this pool; seats beyond that as far as memory is idle."""
        left = turn.shapes[0][1] + max(0, self.free_bytes - self._kept_for_others(turn.pool))
        group = [other for other in self._heads if other.pool == turn.pool]
        agents = max(len(group), self._prospects[turn.pool].agents if turn.pool in self._prospects else 0)

        def serves(candidate: tuple[WaitingTurn, int, int]) -> tuple[int, int, int, int]:
            made_for, slots, bytes = candidate
            return min(slots, suited[made_for.id]), suited[made_for.id], min(slots, agents), -bytes

        # Hundreds may wait, with a handful of windows.
        different = {(it.window, it.shapes): it for it in reversed(group) if turn.tokens <= it.window}.values()
        suited = {it.id: sum(other.tokens <= it.window for other in group) for it in different}
        fitting = [(it, slots, bytes) for it in different for slots, bytes in it.shapes if bytes <= left]
        made_for, slots, bytes = max(fitting, key=serves)
        self.free_bytes -= bytes - turn.shapes[0][1]
        self.steps.append(Open(turn.id, turn.agent_id, made_for.window, slots, made_for.shapes))

    def _kept_for_others(self, pool: PoolId) -> int:
        """What the other pools that somebody may ask for would take: more seats here are not worth their coming and going."""
        known = self._pools.keys() | self._claimed | {pool}
        others = sorted((prospect.bytes for id, prospect in self._prospects.items() if id not in known), reverse=True)
        places = self._live_contexts - len(known)
        return sum(others if places >= len(others) else others[: max(0, int(places))])

    def _find_place(self, turn: WaitingTurn) -> bool:
        """Whether one of the live pools' places is free now; if not, one is waited for or cleared."""
        if self._free_places > 0:
            self._free_places -= 1
            return True
        if self._coming_places > 0:  # (8)
            self._coming_places -= 1
        elif pool := self._first_to_go(turn):  # (9)
            self.drain(pool, turn.id)
            self._coming_places -= 1
        else:
            self._awaited |= {it.id for it in self.busy_pools(below=turn.rank, soon=True)[:1]}
        return False

    def _first_to_go(self, turn: WaitingTurn) -> LivePool | None:
        idle = self._idle_pools()
        if idle:
            return min(idle, key=self._pool_gives_way)
        return next(iter(self.busy_pools(below=turn.rank)), None)


def _prices(turn: WaitingTurn) -> list[tuple[int, int]]:
    """(slots, bytes) of its pools; room for one slot is kept whatever the others were measured to take."""
    return [(slots, max(bytes, turn.shapes[0][1])) for slots, bytes in turn.shapes]
