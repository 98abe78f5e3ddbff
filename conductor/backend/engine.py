"""llama.cpp behind the names that the shell uses: models by id, contexts and conversations by agent.

Methods block and are called from worker threads; the shell sees to it that one context, one conversation and one model's load
or unload are never in two threads at once. Some take no time and may be called from the shell's own thread: what tells
something, `drop_kv`, `forget`, and `drop_turn`, which alone may come while the agent's context opens or closes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from conductor.backend.catalog import pinned
from conductor.backend.conversation import Conversation, Prompter
from conductor.backend.device import Device, margins, open_device
from conductor.backend.estimator import Estimator
from conductor.backend.kv_disk import KvDisk
from conductor.backend.kv_seal import Label
from conductor.backend.kv_store import Blob, KvStore
from conductor.backend.llama import Context, Llama, LlamaError, Model
from conductor.backend.saved_kv import SavedKv
from conductor.backend.turn import Outgrown, TurnOrder, TurnOutcome, TurnRun
from conductor.config import Config
from conductor.core.estimate import Footprint, Geometry, ModelPlan
from conductor.core.pool import MOST_MULTIPROCESSORS, on_gpu, pool_bytes
from conductor.errors import ConfigError, DecodeFailed, ModelLoadFailed
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


@dataclass(frozen=True, slots=True)
class Moved:
    place: KvPlace
    elapsed_s: float


@dataclass(slots=True)
class _Loaded:
    model: Model
    prompter: Prompter
    geometry: Geometry
    weights_bytes: int


@dataclass(slots=True)
class _Live:
    context: Context
    prompter: Prompter
    bytes: int
    pool_bytes: int  #: that it may take on a GPU beside those
    model_id: ModelId
    spec: ContextSpec
    state_bytes: int = 0

    def label(self, conversation: Conversation) -> Label:
        """What a saved KV must be labelled with to be this context's."""
        spec = self.spec
        return Label(self.model_id, spec.kv_type, spec.flash_attention, spec.slots, conversation.held)


class Engine:
    """Start it once in a process: it takes the device, and page-locked host memory on CUDA."""

    def __init__(self, config: Config) -> None:
        self._llama = Llama.instance()
        self.threads = config.threads or _physical_cores()
        self._index = config.device.index
        self._models: dict[ModelId, _Loaded] = {}
        self._live: dict[AgentId, _Live] = {}
        self._conversations: dict[AgentId, Conversation] = {}
        #: turns that stand still for want of room
        self._standing: dict[AgentId, TurnRun] = {}
        self.estimator = Estimator(index=config.device.index)
        self.device: Device = open_device(
            config.device,
            llama_supports_gpu=self._llama.supports_gpu,
            used_bytes=self.used_bytes,
            margin_bytes=self._margin_bytes,
        )
        self.overhead_bytes = self._touch_device()
        arena, pinned = self._llama.pinned(config.host_budget)
        self._saved = SavedKv(KvStore(arena, pinned=pinned, disk=_disk(config)))

    def _touch_device(self) -> int:
        """Bytes that the process takes on a GPU before it holds any model: the CUDA context and its libraries."""
        if self.device.kind is DeviceKind.HOST:
            return 0
        self._llama.touch_device()
        taken = self.device.taken_bytes()
        self.device.claim(taken)
        return taken

    @property
    def version(self) -> str:
        return self._llama.version

    def used_bytes(self) -> int:
        """What models and contexts hold on the device, by llama.cpp's own account."""
        return sum(m.weights_bytes for m in list(self._models.values())) + sum(c.bytes for c in list(self._live.values()))

    def _margin_bytes(self) -> int:
        """What may be held beyond that account: kernels that are loaded late, and the contexts' pools."""
        once = sum(bytes for _, bytes in margins(self.device.kind))
        return once + sum(live.pool_bytes for live in list(self._live.values()))

    def pool_bytes(self, geometry: Geometry, spec: ContextSpec) -> int:
        """What a context takes on a GPU beside what llama.cpp accounts for."""
        if self.device.kind is DeviceKind.HOST:
            return 0
        return pool_bytes(geometry, spec, multiprocessors=self.device.multiprocessors or MOST_MULTIPROCESSORS)

    def priced(self, geometry: Geometry, spec: ContextSpec, took: Footprint) -> Footprint:
        """By llama.cpp's account, as it is booked: with what the driver rounds up, and with the context's pool."""
        rounded = self._rounded(took, geometry)
        return replace(rounded, compute_bytes=rounded.compute_bytes + self.pool_bytes(geometry, spec))

    def _rounded(self, took: Footprint, geometry: Geometry) -> Footprint:
        """As a GPU's driver hands it out."""
        return took if self.device.kind is DeviceKind.HOST else on_gpu(took, geometry)

    def close(self) -> None:
        for loaded in self._models.values():
            loaded.prompter.close()
        self.estimator.close()
        self._saved.close()

    # --- models -----------------------------------------------------------------------------------------------------

    def load(self, plan: ModelPlan) -> int:
        """Load the weights; returns what they really take. Raises ModelLoadFailed."""
        with self.device.moving():
            model, measured = self._load(plan)
            weights = self._rounded(measured, plan.geometry).weights_bytes if measured else plan.weights_bytes
            self._models[plan.id] = _Loaded(model, Prompter(model), plan.geometry, weights)
        return weights

    def _load(self, plan: ModelPlan) -> tuple[Model, Footprint | None]:
        try:
            with pinned(plan) as path:  # loaded again after it was parked, or only now, much later
                model = self._llama.load(path, self.device.kind, index=self._index, name=Path(plan.path).name)
        except LlamaError as error:
            raise ModelLoadFailed(plan.path, str(error)) from error
        try:
            return model, model.footprint(_SMALLEST)
        except LlamaError as error:
            model.close()
            raise ModelLoadFailed(plan.path, f"no context can be made for it: {error}") from error

    def unload(self, model_id: ModelId) -> None:
        with self.device.moving():
            loaded = self._models.pop(model_id)
            loaded.prompter.close()
            loaded.model.close()

    # --- contexts ---------------------------------------------------------------------------------------------------

    def open_context(self, agent_id: AgentId, model_id: ModelId, spec: ContextSpec) -> Opened:
        """Make the agent's context and restore its KV if it was saved. Raises DecodeFailed, with a saved KV kept."""
        live, measured = self._make_live(agent_id, model_id, spec)
        context = live.context
        conversation = self._conversations.setdefault(agent_id, Conversation())
        try:
            restored = self._saved.restore(agent_id, context, live.label(conversation))
        except BaseException:  # nobody knows what the context holds now
            conversation.held = 0
            self._free(agent_id)
            raise
        live.state_bytes = restored
        if not restored:
            conversation.held = 0
        if conversation.given_up:
            conversation.given_up = False
            self._saved.count_dropped()
        return Opened(measured, restored)

    def _make_live(self, agent_id: AgentId, model_id: ModelId, spec: ContextSpec) -> tuple[_Live, int | None]:
        """A new context, and what it takes with its pool; None where this llama.cpp does not tell."""
        loaded = self._models[model_id]
        with self.device.moving():
            try:
                context = loaded.model.context(spec, n_threads=self.threads)
            except LlamaError as error:
                raise DecodeFailed(agent_id, f"its context could not be made: {error}") from error
            took = context.footprint()
            taken = self._rounded(took, loaded.geometry).context_bytes if took else 0
            pool = self.pool_bytes(loaded.geometry, spec)
            live = self._live[agent_id] = _Live(context, loaded.prompter, taken, pool, model_id, spec)
        return live, taken + pool if took else None

    def _free(self, agent_id: AgentId) -> None:
        with self.device.moving():
            self._live.pop(agent_id).context.close()

    def close_context(self, agent_id: AgentId, *, to: KvPlace) -> Closed:
        """Free the agent's context, its KV saved to host memory or disk if there is room; TOKENS drops it."""
        live, conversation = self._live[agent_id], self._conversations[agent_id]
        blob = None
        try:
            if to is KvPlace.TOKENS:
                conversation.given_up = conversation.cached > 0
            else:
                blob = self._save(agent_id, live, conversation, to)
        finally:
            self._free(agent_id)
            if blob is None:
                conversation.held = 0
        return Closed(KvPlace.TOKENS, 0) if blob is None else Closed(blob.place, blob.bytes)

    def _save(self, agent_id: AgentId, live: _Live, conversation: Conversation, to: KvPlace) -> Blob | None:
        conversation.trim(live.context)
        if not conversation.cached:
            return None
        return self._saved.save(agent_id, live.context, live.label(conversation), to=to)

    def state_bytes(self, agent_id: AgentId) -> int:
        """What the KV of a live context takes at most if it is saved before the next turn. Known, so it takes no time."""
        live = self._live.get(agent_id)
        return live.state_bytes if live else 0

    def move_kv(self, agent_id: AgentId) -> Moved:
        """Move the agent's saved KV from host memory to disk; where that fails it is dropped."""
        began_at = time.monotonic()
        if self._saved.move_to_disk(agent_id):
            return Moved(KvPlace.DISK, time.monotonic() - began_at)
        self._conversations[agent_id].held = 0
        return Moved(KvPlace.TOKENS, 0.0)

    def drop_kv(self, agent_id: AgentId) -> None:
        """Forget the agent's saved KV, at once."""
        self._saved.drop(agent_id)
        self._conversations[agent_id].held = 0

    def host_memory(self) -> HostMemoryStatus:
        return self._saved.status()

    # --- turns ------------------------------------------------------------------------------------------------------

    def run_turn(self, order: TurnOrder) -> TurnOutcome | Outgrown:
        """Begin a turn, or go on with the one that stands still. Raises what `TurnRun.go_on` does, and DecodeFailed."""
        agent_id = order.agent_id
        live, conversation = self._live[agent_id], self._conversations[agent_id]
        run, result = self._turn_of(order, conversation), None
        try:
            result = run.go_on(live.context, live.prompter, order)
        except LlamaError as error:
            # What llama.cpp holds after a failed step is not certain: keep the tokens, drop the cache.
            live.context.clear()
            conversation.held = 0
            raise DecodeFailed(agent_id, str(error)) from error
        finally:
            if isinstance(result, Outgrown):
                self._standing[agent_id] = run
            else:
                run.close()
            live.state_bytes = live.context.state_bytes() if conversation.cached else 0
        return result

    def _turn_of(self, order: TurnOrder, conversation: Conversation) -> TurnRun:
        run = self._standing.get(order.agent_id)
        if run is not None and run.request is order.request:
            return self._standing.pop(order.agent_id)
        self.drop_turn(order.agent_id)  # if there was one: with another begun, it goes on no more
        return TurnRun(conversation, order.request)

    def drop_turn(self, agent_id: AgentId) -> int:
        """A turn that stands still goes on no more: the session is as it was before. Returns its tokens. Takes no time."""
        run = self._standing.pop(agent_id, None)
        if run is not None:
            run.take_back()
            run.close()
        return self.tokens(agent_id)

    def suspended_text(self, agent_id: AgentId) -> str:
        """What the agent's turn had made when it had to stand still."""
        run = self._standing.get(agent_id)
        return run.text if run else ""

    def tokens(self, agent_id: AgentId) -> int:
        """How many tokens the agent's conversation holds."""
        conversation = self._conversations.get(agent_id)
        return len(conversation.tokens) if conversation else 0

    def forget(self, agent_id: AgentId) -> None:
        """Drop the agent's conversation, its turn if one stands still, and its saved KV."""
        self.drop_turn(agent_id)
        self._conversations.pop(agent_id, None)
        self._saved.forget(agent_id)


def _disk(config: Config) -> KvDisk | None:
    """Raises ConfigError."""
    if config.disk.directory is None:
        return None
    try:
        return KvDisk(config.resolve(config.disk.directory), budget_bytes=config.disk.budget)
    except OSError as error:
        raise ConfigError(config.source, "disk.directory", f"cannot be used: {error}") from error


def _physical_cores() -> int:
    return psutil.cpu_count(logical=False) or 1
