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

A pool that others' turns could go on in is not emptied before it has been there for the minimum turn (`settled`): moving
caches back and forth serves nobody. Guaranteed agents have pools of their own, which are always there: they only ever meet
rules 1 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from conductor.core.events import TurnId
from conductor.core.moment import (
    FIRST,
    LAST,
    Drain,
    Leave,
    LivePool,
    Load,
    Open,
    Park,
    Pause,
    Picture,
    Rank,
    Sitter,
    Start,
    Step,
    Take,
    WaitingTurn,
    Weights,
)
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


class _Plan:
    """Seats, places and bytes as the plan is made; a promise to an earlier turn is taken off at once."""

    def __init__(self, picture: Picture, heads: Sequence[WaitingTurn]) -> None:
        self.steps: list[Step] = []
        self._heads, self._models, self._prospects = heads, picture.models, picture.prospects
        self._room_bytes, self._live_contexts = picture.room_bytes, picture.live_contexts
        self._own = {sitter.agent_id: sitter for sitter in picture.sitters}
        self._pools = {id: pool for id, pool in picture.pools.items() if not pool.guaranteed}
        self._guaranteed = picture.pools.keys() - self._pools.keys()
        self._sitters: dict[PoolId, list[Sitter]] = {id: [] for id in self._pools}
        for sitter in picture.sitters:
            if sitter.pool in self._pools:
                self._sitters[sitter.pool].append(sitter)
        going = [pool for pool in self._pools.values() if pool.phase in (PoolPhase.DRAINING, PoolPhase.CLOSING)]
        loose = [w for w in picture.models.values() if not w.firm and w.state is not ModelState.PARKED]
        self.coming_bytes = sum(pool.bytes for pool in going)
        self.coming_bytes += sum(w.bytes for w in loose if w.state is ModelState.UNLOADING)
        self.free_bytes = self._room_bytes - sum(pool.bytes for pool in self._pools.values()) - sum(w.bytes for w in loose)
        self._free_places, self._coming_places = picture.live_contexts - len(self._pools), len(going)
        self._gone = {pool.id for pool in going}
        self._claimed: set[PoolId] = set()
        #: models whose weights an earlier turn's pool needs: they are there, on their way, or have their room kept
        self._fetched: set[ModelId] = set()
        #: pools in which somebody sits down
        self._taken = {sitter.pool for sitter in picture.sitters if sitter.phase is Phase.TAKING}
        #: pools in which somebody starts or has been given a seat in this plan
        self._expecting: set[PoolId] = set()
        #: pools that an earlier turn will have emptied once those who run there ran their minimum
        self._awaited: set[PoolId] = set()
        #: READY seats whose agents did not start in this plan
        self._idle = {sitter.agent_id: sitter for sitter in picture.sitters if self._is_idle(sitter)}
        self._free_seats = {id: pool.slots - len(self._sitters[id]) for id, pool in self._pools.items()}
        self._coming_seats = {id: sum(map(_goes, sitters)) for id, sitters in self._sitters.items()}
        #: pools in which a turn runs or is about to
        self._in_use = {
            id for id, sitters in self._sitters.items() if any(s.phase in (Phase.BUSY, Phase.TAKING) for s in sitters)
        } | {id for id, pool in self._pools.items() if pool.phase is PoolPhase.OPENING}
        over_loose = {pool.model_id for pool in self._pools.values()}
        resident = {w.model_id: w for w in loose if w.state is ModelState.RESIDENT}
        self._idle_weights = {id: w for id, w in resident.items() if id not in over_loose}
        #: weights that will be idle once the pools above them are gone
        self._under_pools = {id: w for id, w in resident.items() if id in over_loose}

    def _is_idle(self, sitter: Sitter) -> bool:
        return sitter.phase is Phase.READY and sitter.pool in self._pools and sitter.pool not in self._gone

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
            self._drain(pool, turn.id)
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
        self._drain(pool, turn.id)
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
        return turn.shapes[0][1] + (0 if model.firm else model.bytes) > self._room_bytes

    def _make_pool(self, turn: WaitingTurn, *, comes: bool) -> None:
        """Load, open, or see to it that there will be room. `comes`: the pool's place is being cleared already."""
        if turn.pool in self._claimed or self._alone_too_large(turn):  # (5)
            return
        self._claimed.add(turn.pool)
        model, needed = self._models[turn.model_id], self._needs(turn)
        self._idle_weights.pop(turn.model_id, None)
        self._under_pools.pop(turn.model_id, None)
        if comes:
            self._coming_places -= 1
        is_first = turn.model_id not in self._fetched  # of those that the model's weights are loaded for, if they must be
        self._fetched.add(turn.model_id)
        has_place = not comes and self._find_place(turn)
        has_bytes = needed <= self.free_bytes
        if not has_bytes:  # (8), (9)
            self._clear(needed - self.free_bytes - self.coming_bytes, turn)
        self.free_bytes -= needed  # (6), (10)
        if has_bytes and model.state is ModelState.PARKED and is_first:  # (7)
            self.steps.append(Load(turn.model_id))
        elif has_bytes and has_place and model.state is ModelState.RESIDENT:  # (7)
            self._open(turn)

    def _needs(self, turn: WaitingTurn) -> int:
        """Bytes of the room for turns that the turn will take, beyond what its model has of it already."""
        model = self._models[turn.model_id]
        absent = model.state in (ModelState.PARKED, ModelState.UNLOADING) and turn.model_id not in self._fetched
        return turn.shapes[0][1] + (model.bytes if absent else 0)

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
            self._drain(pool, turn.id)
            self._coming_places -= 1
        else:
            self._awaited |= {it.id for it in self.busy_pools(below=turn.rank, soon=True)[:1]}
        return False

    def _first_to_go(self, turn: WaitingTurn) -> LivePool | None:
        idle = self._idle_pools()
        if idle:
            return min(idle, key=self._pool_gives_way)
        return next(iter(self.busy_pools(below=turn.rank)), None)

    # --- what leaves --------------------------------------------------------------------------------------------------

    def _clear(self, bytes: int, turn: WaitingTurn) -> None:
        """(9) What is idle, and if that is not enough, what is busy with turns of lower rank, if that is."""
        missing = self.evict(bytes, for_turn=turn.id)
        if missing > 0:
            lower, soon = (self.busy_pools(below=turn.rank, soon=soon) for soon in (False, True))
            if sum(map(self._brings, lower)) >= missing:
                self.displace(missing, lower, for_turn=turn.id)
            elif sum(map(self._brings, soon)) >= missing:
                self._awaited |= {pool.id for pool in soon}

    def evict(self, bytes: int, *, for_turn: TurnId | None, last: frozenset[AgentId] = frozenset()) -> int:
        """Empty and park what is idle, no more than brings `bytes`; pools of `last` only if need be. Returns what is missing."""
        bytes -= self._weights_to_come(bytes)
        idle: list[LivePool | Weights] = [*self._idle_pools(), *self._idle_weights.values()]
        idle.sort(key=lambda it: (isinstance(it, LivePool) and self._is_of(it, last), *self._idle_gives_way(it)))
        for it in idle:
            if bytes <= 0:
                break
            if isinstance(it, LivePool):
                bytes -= self._drain(it, for_turn)
            else:
                bytes -= it.bytes
                del self._idle_weights[it.model_id]
                self.steps.append(Park(it.model_id))
                self.coming_bytes += it.bytes
        return bytes

    def displace(self, bytes: int, pools: Iterable[LivePool], *, for_turn: TurnId | None) -> None:
        for pool in pools:
            if bytes <= 0:
                return
            bytes -= self._drain(pool, for_turn)

    def _drain(self, pool: LivePool, for_turn: TurnId | None) -> int:
        """Returns what that will bring."""
        brings = self._brings(pool)
        if brings > pool.bytes:
            del self._under_pools[pool.model_id]
        self.steps.append(Drain(pool.id, for_turn))
        self._gone.add(pool.id)
        for sitter in self._sitters[pool.id]:
            self._idle.pop(sitter.agent_id, None)
        self.coming_bytes += brings
        self._coming_places += 1
        return brings

    def _brings(self, pool: LivePool) -> int:
        """Its bytes, and those of weights that will be idle without it: they are parked when it is closed."""
        weights = self._under_pools.get(pool.model_id)
        return pool.bytes + (weights.bytes if weights and self._are_gone(pool.model_id, besides=pool.id) else 0)

    def _weights_to_come(self, bytes: int) -> int:
        """Those under pools that are on their way out, as far as so many bytes need them."""
        found = 0
        for weights in [weights for id, weights in self._under_pools.items() if self._are_gone(id)]:
            if found < bytes:
                del self._under_pools[weights.model_id]
                self.coming_bytes += weights.bytes
                found += weights.bytes
        return found

    def _are_gone(self, model_id: ModelId, *, besides: PoolId | None = None) -> bool:
        """Whether all pools of the model are on their way out, `besides` one."""
        return all(pool.id in self._gone or pool.id == besides for pool in self._pools.values() if pool.model_id == model_id)

    def _idle_pools(self) -> list[LivePool]:
        """Those in which no turn runs, nor could one go on before they have been there for the minimum turn."""
        windows = {id: pool.window for id, pool in self._pools.items()}
        wanted = {turn.pool for turn in self._heads if turn.tokens <= windows.get(turn.pool, 0)}
        return [
            pool
            for id, pool in self._pools.items()
            if id not in self._in_use and id not in self._gone and id not in self._claimed and (pool.settled or id not in wanted)
        ]

    def busy_pools(self, *, below: Rank | None = None, soon: bool = False) -> list[LivePool]:
        """Those whose turns may stand still, or may `soon`, all of them ranking lower than `below` if given; the lowest first."""
        found: list[tuple[Rank, LivePool]] = []
        for id, pool in self._pools.items():
            if id not in self._in_use or id in self._gone or pool.phase is not PoolPhase.READY:
                continue
            running = [sitter for sitter in self._sitters[id] if sitter.phase is Phase.BUSY]
            highest = min((sitter.rank for sitter in running), default=LAST)
            may = soon or (all(s.may_pause or s.pausing for s in running) and id not in self._taken)
            may = may and pool.settled and id not in self._expecting
            if below is None or (may and highest > below):
                found.append((highest, pool))
        return [pool for _, pool in sorted(found, key=lambda it: it[0], reverse=True)]

    def _is_of(self, pool: LivePool, agents: frozenset[AgentId]) -> bool:
        return any(sitter.agent_id in agents for sitter in self._sitters[pool.id])

    def _pool_gives_way(self, pool: LivePool) -> tuple[bool, int]:
        """Best-effort agents' first, then those used longest ago."""
        sitters = self._sitters[pool.id]
        return not all(s.best_effort for s in sitters), max((s.last_turn for s in sitters), default=0)

    def _idle_gives_way(self, idle: LivePool | Weights) -> tuple[bool, int]:
        """Weights leave only where best-effort agents alone use them."""
        return self._pool_gives_way(idle) if isinstance(idle, LivePool) else (False, idle.last_turn)


def _goes(sitter: Sitter) -> bool:
    return sitter.phase is Phase.LEAVING or sitter.pausing
