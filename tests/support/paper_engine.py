"""What an engine would hold, kept on paper: it refuses to be asked for what no engine could do."""

from __future__ import annotations

from typing import TypeAlias

from conductor.core import actions
from conductor.core.events import TurnId
from conductor.types import AgentId, KvPlace, ModelId

Work: TypeAlias = (
    actions.LoadModel | actions.UnloadModel | actions.OpenContext | actions.CloseContext | actions.RunTurn | actions.MoveKv
)

KV_BYTES_PER_TOKEN = 2


class PaperEngine:
    """Weights, contexts and saved KV in bytes, and what there is to do. Being asked for the impossible fails the test."""

    def __init__(self, *, live_contexts: int) -> None:
        self.live_contexts = live_contexts
        self.guaranteed: set[AgentId] = set()  #: whose contexts are not counted
        self.todo: list[Work] = []
        self.weights: dict[ModelId, int] = {}
        self.places: dict[AgentId, ModelId] = {}  #: contexts live, on their way in or on their way out
        self.windows: dict[AgentId, int] = {}  #: of contexts live or on their way in: the tokens they have room for
        self.contexts: dict[AgentId, int] = {}  #: bytes
        self.held: dict[AgentId, int] = {}  #: bytes of KV in them
        self.saved: dict[AgentId, int] = {}
        self.tokens: dict[AgentId, int] = {}  #: of each session, without those of a turn that is not over
        self.suspended: dict[AgentId, TurnId] = {}  #: turns that stopped because they outgrew their context

    def ask(self, work: Work) -> None:
        assert subject(work) not in map(subject, self.todo), f"asked for {work} while busy with it: {self.todo}"
        match work:
            case actions.LoadModel(plan):
                assert plan.id not in self.weights
            case actions.UnloadModel(model_id):
                assert model_id in self.weights
                assert model_id not in self.places.values(), "a model unloaded under a live context"
            case actions.OpenContext(agent_id, context, model_id):
                assert model_id in self.weights
                assert agent_id not in self.places
                others = [model for agent, model in self.places.items() if agent not in self.guaranteed]
                assert agent_id in self.guaranteed or model_id not in others, "two contexts of one model"
                assert agent_id in self.guaranteed or len(others) < self.live_contexts
                self.places[agent_id], self.windows[agent_id] = model_id, context.window
            case actions.CloseContext(agent_id):
                assert agent_id in self.contexts
            case actions.RunTurn(turn_id, agent_id, room):
                assert room == self.windows[agent_id]
                assert self.suspended.pop(agent_id, turn_id) == turn_id, "a turn begun before the one that stopped is over"
                assert self.tokens.get(agent_id, 0) <= room, "a session in a window that is too small for it"
            case actions.MoveKv(agent_id):
                assert agent_id in self.saved
                assert agent_id not in self.places
        self.todo.append(work)

    def take(self, kind: type[Work], about: str) -> Work:
        """The one piece of work of this kind about this model or agent, no longer to do."""
        found = [work for work in self.todo if isinstance(work, kind) and subject(work) == about]
        assert found, f"the engine was not asked for {kind.__name__} of {about}, only for {self.todo}"
        self.todo.remove(found[0])
        return found[0]

    def open(self, agent_id: AgentId, takes: int, *, kv_lost: bool) -> int:
        """Bytes restored: what was saved, unless it is lost or more than the window has room for."""
        saved = self.saved.pop(agent_id, 0)
        kv_lost |= saved > self.windows[agent_id] * KV_BYTES_PER_TOKEN
        self.contexts[agent_id], self.held[agent_id] = takes, 0 if kv_lost else saved
        return self.held[agent_id]

    def fail_to_open(self, agent_id: AgentId) -> None:
        del self.places[agent_id], self.windows[agent_id]

    def ends(self, agent_id: AgentId, *, tokens: int) -> int:
        """The turn is over; the bytes of KV that the session has now."""
        self.tokens[agent_id], self.held[agent_id] = tokens, tokens * KV_BYTES_PER_TOKEN
        return self.held[agent_id]

    def stops(self, agent_id: AgentId, turn_id: TurnId, *, tokens: int) -> int:
        """The turn stands still because it outgrew its context; the bytes of KV that the session has now."""
        self.suspended[agent_id], self.held[agent_id] = turn_id, tokens * KV_BYTES_PER_TOKEN
        return self.held[agent_id]

    def close(self, agent_id: AgentId, *, to: KvPlace) -> int:
        """Bytes saved: of a turn that was dropped, nothing."""
        del self.places[agent_id], self.windows[agent_id], self.contexts[agent_id]
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

    def drop_kv(self, agent_id: AgentId) -> None:
        assert agent_id not in self.places, "a saved KV dropped while it is being restored"
        del self.saved[agent_id]

    def drop_turn(self, agent_id: AgentId) -> None:
        assert agent_id in self.suspended, "there is no turn to drop"
        del self.suspended[agent_id]

    def forget(self, agent_id: AgentId) -> None:
        assert agent_id not in self.places, "an agent forgotten with its context live"
        assert agent_id not in self.suspended, "an agent forgotten with a turn that is not over"
        self.saved.pop(agent_id, None)
        self.tokens.pop(agent_id, None)


def subject(work: Work) -> str:
    match work:
        case actions.LoadModel(plan):
            return plan.id
        case actions.UnloadModel(model_id):
            return model_id
        case _:
            return work.agent_id
