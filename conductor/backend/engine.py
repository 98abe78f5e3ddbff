"""llama.cpp behind the names that the shell uses: models by id, contexts and conversations by agent.

Every method blocks and is called from worker threads; the shell sees to it that one context, one conversation and one
model's load or unload are never in two threads at once. What is shared, the KV arena, has a lock.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import psutil

from conductor.backend.conversation import Conversation, Prompter
from conductor.backend.device import Device, open_device
from conductor.backend.estimator import Estimator
from conductor.backend.kv_store import Blob, KvStore
from conductor.backend.llama import Context, Llama, LlamaError, Model
from conductor.backend.turn import TurnOrder, TurnOutcome, run_turn
from conductor.config import Config
from conductor.core.estimate import ModelPlan
from conductor.errors import DecodeFailed, ModelLoadFailed
from conductor.types import AgentId, ContextSpec, DeviceKind, HostMemoryStatus, KvPlace, ModelId

#: to ask a loaded model what its weights take
_SMALLEST = ContextSpec(window=256, n_batch=1, n_ubatch=1)


@dataclass(frozen=True, slots=True)
class Opened:
    """`context_bytes` is None where this llama.cpp does not tell."""

    context_bytes: int | None
    restored_bytes: int


@dataclass(frozen=True, slots=True)
class Closed:
    place: KvPlace
    saved_bytes: int


@dataclass(slots=True)
class _Loaded:
    model: Model
    prompter: Prompter
    weights_bytes: int


@dataclass(slots=True)
class _Live:
    context: Context
    prompter: Prompter
    bytes: int


class Engine:
    """Start it once in a process: it takes the device, and page-locked host memory on CUDA."""

    def __init__(self, config: Config) -> None:
        self._llama = Llama.instance()
        self.threads = config.threads or _physical_cores()
        self._index = config.device.index
        self._models: dict[ModelId, _Loaded] = {}
        self._live: dict[AgentId, _Live] = {}
        self._conversations: dict[AgentId, Conversation] = {}
        self._blobs: dict[AgentId, Blob] = {}
        self._arena_lock = threading.Lock()
        self.estimator = Estimator(index=config.device.index)
        self.device: Device = open_device(
            config.device, llama_supports_gpu=self._llama.supports_gpu, used_bytes=self.used_bytes
        )
        self.overhead_bytes = self._touch_device()
        arena, pinned = self._llama.pinned(config.host_kv_budget)
        self._store = KvStore(arena, pinned=pinned)

    def _touch_device(self) -> int:
        """Bytes that the process takes on a GPU before it holds any model: the CUDA context and its libraries."""
        if self.device.kind is DeviceKind.HOST:
            return 0
        self._llama.touch_device()
        return self.device.taken_bytes()

    @property
    def version(self) -> str:
        return self._llama.version

    def used_bytes(self) -> int:
        """What models and contexts hold on the device, by llama.cpp's own account."""
        return sum(m.weights_bytes for m in list(self._models.values())) + sum(c.bytes for c in list(self._live.values()))

    def host_memory(self) -> HostMemoryStatus:
        return HostMemoryStatus(self._store.budget_bytes, self._store.used_bytes, self._store.pinned)

    def close(self) -> None:
        self.estimator.close()

    # --- models -----------------------------------------------------------------------------------------------------

    def load(self, plan: ModelPlan) -> int:
        """Load the weights; returns what they really take. Raises ModelLoadFailed."""
        try:
            model = self._llama.load(plan.path, self.device.kind, index=self._index)
        except LlamaError as error:
            raise ModelLoadFailed(plan.path, str(error)) from error
        try:
            measured = model.footprint(_SMALLEST)
        except LlamaError as error:
            model.close()
            raise ModelLoadFailed(plan.path, f"no context can be made for it: {error}") from error
        weights = plan.weights_bytes if measured is None else measured.weights_bytes
        self._models[plan.id] = _Loaded(model, Prompter(model), weights)
        return weights

    def unload(self, model_id: ModelId) -> None:
        self._models.pop(model_id).model.close()

    # --- contexts ---------------------------------------------------------------------------------------------------

    def open_context(self, agent_id: AgentId, model_id: ModelId, spec: ContextSpec) -> Opened:
        """Make the agent's context and restore its KV if it was saved. Raises DecodeFailed, with a saved KV kept."""
        loaded = self._models[model_id]
        try:
            context = loaded.model.context(spec, n_threads=self.threads)
        except LlamaError as error:
            raise DecodeFailed(agent_id, f"its context could not be made: {error}") from error
        footprint = context.footprint()
        measured = footprint.context_bytes if footprint else None
        self._live[agent_id] = _Live(context, loaded.prompter, measured or 0)
        conversation = self._conversations.setdefault(agent_id, Conversation())
        blob = self._blobs.pop(agent_id, None)
        if blob is None:
            conversation.cached = 0
            return Opened(measured, restored_bytes=0)
        restored = context.restore(self._store.view(blob))
        with self._arena_lock:
            self._store.free(blob)
        if not restored:
            conversation.cached = 0
        return Opened(measured, blob.bytes if restored else 0)

    def close_context(self, agent_id: AgentId, *, save: bool) -> Closed:
        """Free the agent's context, its KV saved first if asked for and if the arena has room."""
        live = self._live[agent_id]
        conversation, blob = self._conversations[agent_id], None
        try:
            blob = self._save(live.context, conversation) if save else None
        finally:
            live.context.close()
            del self._live[agent_id]
            if blob is None:
                conversation.cached = 0
        if blob is None:
            return Closed(KvPlace.TOKENS, 0)
        self._blobs[agent_id] = blob
        return Closed(KvPlace.HOST, blob.bytes)

    def _save(self, context: Context, conversation: Conversation) -> Blob | None:
        if conversation.cached == 0:
            return None
        size = context.state_bytes()
        with self._arena_lock:
            blob = self._store.allocate(size) if size else None
        if blob is None:
            return None  # the tokens are kept, and the KV recomputed from them
        try:
            context.save(self._store.view(blob))
        except LlamaError:
            with self._arena_lock:
                self._store.free(blob)
            return None
        return blob

    def run_turn(self, order: TurnOrder) -> TurnOutcome:
        """Raises InvalidRequest, ChatTemplateFailed, WindowFull, TurnCancelled, DecodeFailed."""
        live, conversation = self._live[order.agent_id], self._conversations[order.agent_id]
        try:
            return run_turn(live.context, conversation, live.prompter, order)
        except LlamaError as error:
            # What llama.cpp holds after a failed step is not certain: keep the tokens, drop the cache.
            live.context.clear()
            conversation.cached = 0
            raise DecodeFailed(order.agent_id, str(error)) from error

    def tokens(self, agent_id: AgentId) -> int:
        """How many tokens the agent's conversation holds."""
        conversation = self._conversations.get(agent_id)
        return len(conversation.tokens) if conversation else 0

    def forget(self, agent_id: AgentId) -> None:
        """Drop the agent's conversation and its saved KV."""
        self._conversations.pop(agent_id, None)
        if (blob := self._blobs.pop(agent_id, None)) is not None:
            with self._arena_lock:
                self._store.free(blob)


def _physical_cores() -> int:
    return psutil.cpu_count(logical=False) or 1
