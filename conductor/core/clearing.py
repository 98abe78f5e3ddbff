"""What leaves the device so that a turn has room: pools and weights as a plan is made, and which of them go first.

The half of a plan (`turns`) that takes; its rules (8) and (9). Plain values in, steps out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from conductor.core.events import TurnId
from conductor.core.moment import LAST, Drain, LivePool, Park, Picture, Rank, Sitter, Step, WaitingTurn, Weights
from conductor.core.placing import Choice
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Phase
from conductor.types import AgentId, ModelId, ModelState, PoolId


class Clearing:
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
        #: those who want to decode now, by pool
        self._agents = Counter(turn.pool for turn in heads)
        self._agents.update(sitter.pool for sitter in picture.sitters if sitter.phase is Phase.BUSY)
        self._choices: dict[tuple[PoolId, tuple[tuple[int, int], ...], int], Choice | None] = {}
        #: models whose weights go, in this plan
        self._parked: set[ModelId] = set()
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

    # --- what leaves --------------------------------------------------------------------------------------------------

    def clear(self, bytes: int, turn: WaitingTurn) -> None:
        """(9) What is idle, and if that is not enough, what is busy with turns of lower rank, if that is."""
        missing = self.evict(bytes, for_turn=turn.id)
        if missing > 0:
            lower, soon = (self.busy_pools(below=turn.rank, soon=soon) for soon in (False, True))
            if sum(map(self._brings, lower)) >= missing:
                self.displace(missing, lower, for_turn=turn.id)
            elif sum(map(self._brings, soon)) >= missing:
                self._awaited |= {pool.id for pool in soon}

    def evict(
        self, bytes: int, *, for_turn: TurnId | None, last: frozenset[AgentId] = frozenset(), best_effort_only: bool = False
    ) -> int:
        """Empty and park what is idle, no more than brings `bytes`; pools of `last` only if need be. Returns what is missing.

        `best_effort_only`: of pools, those in which nobody has a better promise.
        """
        bytes -= self._weights_to_come(bytes)
        idle: list[LivePool | Weights] = [*self._idle_pools(), *self._idle_weights.values()]
        idle.sort(key=lambda it: (isinstance(it, LivePool) and self._is_of(it, last), *self._idle_gives_way(it)))
        for it in idle:
            if bytes <= 0:
                break
            if isinstance(it, LivePool):
                keeps = best_effort_only and self._pool_gives_way(it)[0]
                bytes -= 0 if keeps else self.drain(it, for_turn)
            else:
                bytes -= it.bytes
                del self._idle_weights[it.model_id]
                self.park(it.model_id)
                self.coming_bytes += it.bytes
        return bytes

    def park(self, model_id: ModelId) -> None:
        self._parked.add(model_id)
        self.steps.append(Park(model_id))

    def displace(self, bytes: int, pools: Iterable[LivePool], *, for_turn: TurnId | None) -> None:
        for pool in pools:
            if bytes <= 0:
                return
            bytes -= self.drain(pool, for_turn)

    def drain(self, pool: LivePool, for_turn: TurnId | None) -> int:
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
