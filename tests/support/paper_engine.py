"""What an engine would hold, kept on paper: it refuses to be asked for what no engine could do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from conductor.core import actions
from conductor.core.events import TurnId
from conductor.types import AgentId, KvPlace, ModelId, PoolId

Work: TypeAlias = (
    actions.LoadModel | actions.UnloadModel | actions.OpenPool | actions.ClosePool | actions.TakeSeat | actions.LeaveSeat
    | actions.RunTurn | actions.MoveKv | actions.CopyKv
)  # fmt: skip

KV_BYTES_PER_TOKEN = 2


@dataclass(frozen=True)
class Standing:
    """A turn that stopped, whole."""

    turn_id: TurnId
    tokens: int
    has_made: bool


class PaperEngine:
    """Weights, pools and saved KV in bytes, and what there is to do. Being asked for the impossible fails the test."""

    def __init__(self, *, live_contexts: int | None) -> None:
        self.live_contexts = live_contexts
        self.todo: list[Work] = []
        self.weights: dict[ModelId, int] = {}
        self.homes: set[ModelId] = set()  #: models whose weights are in host memory
        self.pools: dict[PoolId, actions.OpenPool] = {}  #: there, on their way in or on their way out
        self.contexts: dict[PoolId, int] = {}  #: bytes of those that are there
        self.seats: dict[AgentId, PoolId] = {}  #: taken, being taken or being left
        self.held: dict[AgentId, int] = {}  #: bytes of KV in the seats that are taken
        self.saved: dict[AgentId, int] = {}
        self.tokens: dict[AgentId, int] = {}  #: of each session, without those of a turn that is not over
        self.suspended: dict[AgentId, Standing] = {}  #: turns that stand still

    def ask(self, work: Work) -> None:
        busy = {it for doing in self.todo for it in subjects(doing)}
        assert not busy & subjects(work), f"asked for {work} while busy with it: {self.todo}"
        match work:
            case actions.LoadModel(plan, placement):
                assert plan.id not in self.weights
                assert placement is not None or plan.id not in self.homes, "loaded from its file, and it has a home"
            case actions.UnloadModel(model_id, keep_home):
                assert model_id in self.weights or (model_id in self.homes and not keep_home)
                assert model_id not in {pool.model_id for pool in self.pools.values()}, "a model unloaded under a live pool"
            case actions.OpenPool(pool_id, model_id):
                assert model_id in self.weights
                assert pool_id not in self.pools
                self.pools[pool_id] = work
                turning = [id for id in self.pools if id.startswith("model:")]
                assert self.live_contexts is None or len(turning) <= self.live_contexts
            case actions.ClosePool(pool_id):
                assert pool_id in self.contexts
                assert pool_id not in self.seats.values(), "a pool closed under its agents"
            case actions.TakeSeat(agent_id, pool_id):
                assert pool_id in self.contexts
                assert agent_id not in self.seats
                self.seats[agent_id] = pool_id
                taken = sum(pool == pool_id for pool in self.seats.values())
                assert taken <= self.pools[pool_id].context.slots, "more agents than slots"
            case actions.LeaveSeat(agent_id):
                assert agent_id in self.held
            case actions.RunTurn(turn_id, agent_id, room):
                assert agent_id in self.held
                assert room <= self.pools[self.seats[agent_id]].context.window
                standing = self.suspended.pop(agent_id, None)
                assert standing is None or standing.turn_id == turn_id, "a turn begun before the one that stopped is over"
                tokens = standing.tokens if standing else self.tokens.get(agent_id, 0)
                assert tokens <= room, "a session in a window that is too small for it"
            case actions.MoveKv(agent_id):
                assert agent_id in self.saved
                assert agent_id not in self.seats
            case actions.CopyKv(_, source, new):
                assert source not in self.suspended, "a conversation cloned in the middle of a turn"
                assert source not in self.seats or source in self.held
                assert new not in self.seats
                assert new not in self.saved
                assert not self.tokens.get(new)
        self.todo.append(work)

    def take(self, kind: type[Work], about: str) -> Work:
        """The one piece of work of this kind about this model, pool or agent, no longer to do."""
        found = [work for work in self.todo if isinstance(work, kind) and about in subjects(work)]
        assert found, f"the engine was not asked for {kind.__name__} of {about}, only for {self.todo}"
        self.todo.remove(found[0])
        return found[0]

    def is_asked(self, kind: type[Work], about: str) -> bool:
        return any(isinstance(work, kind) and about in subjects(work) for work in self.todo)

    def restore(self, agent_id: AgentId, *, kv_lost: bool) -> int:
        """Bytes restored: what was saved, unless it is lost or more than the window has room for."""
        saved = self.saved.pop(agent_id, 0)
        kv_lost |= saved > self.pools[self.seats[agent_id]].context.window * KV_BYTES_PER_TOKEN
        self.held[agent_id] = 0 if kv_lost else saved
        return self.held[agent_id]

    def ends(self, agent_id: AgentId, *, tokens: int) -> int:
        """The turn is over; the bytes of KV that the session has now."""
        self.tokens[agent_id], self.held[agent_id] = tokens, tokens * KV_BYTES_PER_TOKEN
        return self.held[agent_id]

    def stops(self, agent_id: AgentId, turn_id: TurnId, *, tokens: int, has_made: bool) -> int:
        """The turn stands still; the bytes of KV that the session has now."""
        self.suspended[agent_id] = Standing(turn_id, tokens, has_made)
        self.held[agent_id] = tokens * KV_BYTES_PER_TOKEN
        return self.held[agent_id]

    def ends_standing(self, agent_id: AgentId) -> None:
        """With what it made, or as if it had not been."""
        standing = self.suspended.pop(agent_id)
        if standing.has_made:
            self.tokens[agent_id] = standing.tokens

    def leave(self, agent_id: AgentId, *, to: KvPlace) -> int:
        """Bytes saved: of a turn that was dropped, nothing."""
        del self.seats[agent_id]
        held = self.held.pop(agent_id)
        if agent_id not in self.suspended:
            held = min(held, self.tokens.get(agent_id, 0) * KV_BYTES_PER_TOKEN)
        if held and to is not KvPlace.TOKENS:
            self.saved[agent_id] = held
        return self.saved.get(agent_id, 0)

    def move(self, agent_id: AgentId, *, fails: bool) -> KvPlace:
        if fails:
            del self.saved[agent_id]
        return KvPlace.TOKENS if fails else KvPlace.DISK

    def copy(self, source: AgentId, new: AgentId, *, to: KvPlace) -> int:
        """The tokens always; bytes of KV copied."""
        if source in self.tokens:
            self.tokens[new] = self.tokens[source]
        valid = self.tokens.get(source, 0) * KV_BYTES_PER_TOKEN
        kept = min(self.held[source], valid) if source in self.held else self.saved.get(source, 0)
        if kept and to is KvPlace.HOST:
            self.saved[new] = kept
        return self.saved.get(new, 0)

    def drop_kv(self, agent_id: AgentId) -> None:
        assert not any(agent_id in subjects(work) for work in self.todo), "a saved KV dropped while it is used"
        assert agent_id not in self.seats, "a saved KV dropped while it is being restored"
        del self.saved[agent_id]

    def drop_turn(self, agent_id: AgentId) -> None:
        assert agent_id in self.suspended, "there is no turn to drop"
        del self.suspended[agent_id]

    def forget(self, agent_id: AgentId) -> None:
        assert not any(agent_id in subjects(work) for work in self.todo), "an agent forgotten while something is done with it"
        assert agent_id not in self.seats, "an agent forgotten in its seat"
        assert agent_id not in self.suspended, "an agent forgotten with a turn that is not over"
        self.saved.pop(agent_id, None)
        self.tokens.pop(agent_id, None)


def subjects(work: Work) -> set[str]:
    """The model, the pool or the agents that it is about."""
    match work:
        case actions.LoadModel(plan):
            return {plan.id}
        case actions.UnloadModel(model_id):
            return {model_id}
        case actions.OpenPool(pool_id) | actions.ClosePool(pool_id):
            return {pool_id}
        case actions.CopyKv(_, source, new):
            return {source, new}
        case _:
            return {work.agent_id}
