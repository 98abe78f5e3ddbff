"""What an engine would hold, kept on paper: it refuses to be asked for what no engine could do."""

from __future__ import annotations

from typing import TypeAlias

from conductor.core import actions
from conductor.types import AgentId, KvPlace, ModelId

Work: TypeAlias = actions.LoadModel | actions.UnloadModel | actions.OpenContext | actions.CloseContext | actions.RunTurn

KV_BYTES_PER_TOKEN = 2


class PaperEngine:
    """Weights, contexts and saved KV in bytes, and what there is to do. Being asked for the impossible fails the test."""

    def __init__(self, *, live_contexts: int) -> None:
        self.live_contexts = live_contexts
        self.todo: list[Work] = []
        self.weights: dict[ModelId, int] = {}
        self.places: dict[AgentId, ModelId] = {}  #: contexts live, on their way in or on their way out
        self.contexts: dict[AgentId, int] = {}
        self.tokens: dict[AgentId, int] = {}
        self.saved: dict[AgentId, int] = {}

    def ask(self, work: Work) -> None:
        assert subject(work) not in map(subject, self.todo), f"asked for {work} while busy with it: {self.todo}"
        match work:
            case actions.LoadModel(plan):
                assert plan.id not in self.weights
            case actions.UnloadModel(model_id):
                assert model_id in self.weights
                assert model_id not in self.places.values(), "a model unloaded under a live context"
            case actions.OpenContext(agent_id, _, model_id):
                assert model_id in self.weights
                assert model_id not in self.places.values(), "two contexts of one model"
                self.places[agent_id] = model_id
                assert len(self.places) <= self.live_contexts
            case actions.CloseContext(agent_id) | actions.RunTurn(_, agent_id):
                assert agent_id in self.contexts
        self.todo.append(work)

    def take(self, kind: type[Work], about: str) -> Work:
        """The one piece of work of this kind about this model or agent, no longer to do."""
        found = [work for work in self.todo if isinstance(work, kind) and subject(work) == about]
        assert found, f"the engine was not asked for {kind.__name__} of {about}, only for {self.todo}"
        self.todo.remove(found[0])
        return found[0]

    def open(self, agent_id: AgentId, takes: int, *, kv_lost: bool) -> int:
        """Bytes restored."""
        saved = self.saved.pop(agent_id, 0)
        self.contexts[agent_id] = takes
        return 0 if kv_lost else saved

    def fail_to_open(self, agent_id: AgentId) -> KvPlace:
        del self.places[agent_id]
        return KvPlace.HOST if agent_id in self.saved else KvPlace.TOKENS

    def close(self, agent_id: AgentId, *, save: bool) -> int:
        """Bytes saved."""
        del self.places[agent_id], self.contexts[agent_id]
        if save and (tokens := self.tokens.get(agent_id, 0)):
            self.saved[agent_id] = tokens * KV_BYTES_PER_TOKEN
        return self.saved.get(agent_id, 0)

    def forget(self, agent_id: AgentId) -> None:
        assert agent_id not in self.places, "an agent forgotten with its context live"
        self.tokens.pop(agent_id, None)
        self.saved.pop(agent_id, None)


def subject(work: Work) -> str:
    match work:
        case actions.LoadModel(plan):
            return plan.id
        case actions.UnloadModel(model_id):
            return model_id
        case _:
            return work.agent_id
