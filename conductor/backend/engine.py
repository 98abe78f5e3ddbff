"""llama.cpp behind the names that the shell uses: models by id, contexts as pools, conversations and turns by agent.

What blocks (`load`, `unload`, `open_pool`, `close_pool`, `move_kv`) is called from worker threads; the shell sees to it that
one model's load and unload, and one pool's opening and closing, are never in two threads at once. All else takes no time and
may be called from the shell's own thread: what takes time is done in the pools' threads, and answered in futures.

See also: `models`, `pools`, `seats`, `turns`, whose methods these are.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import psutil

from conductor.backend.device import Device, margins, open_device
from conductor.backend.estimator import Estimator
from conductor.backend.kv_disk import KvDisk
from conductor.backend.kv_store import KvStore
from conductor.backend.llama import Llama, LlamaError, measure_link
from conductor.backend.models import Models, priced, temporary_bytes
from conductor.backend.pools import Pools
from conductor.backend.saved_kv import SavedKv
from conductor.backend.seats import Closed, Seats
from conductor.backend.turn import TurnEnd, TurnOrder, TurnOutcome
from conductor.backend.turns import Turns
from conductor.config import Config
from conductor.core.estimate import Footprint, Geometry, ModelPlan
from conductor.core.streaming import Placement
from conductor.errors import ConfigError
from conductor.types import (
    AgentId,
    ContextSpec,
    DeviceKind,
    FinishReason,
    HostMemoryStatus,
    KvPlace,
    ModelId,
    PoolId,
    WeightsStatus,
)
from conductor.units import MIB

__all__ = ["Closed", "Engine", "Moved"]

#: Prompts are rendered and tokenised in so many threads at most.
_PROMPT_THREADS = 8
#: Saved KV is written to disk and copied in others: a slow disk must not keep turns from beginning.
_KV_THREADS = 4
#: What the link is measured with; on the host device, whose memory is as near, less.
_PROBE_BYTES = {DeviceKind.CUDA: 64 * MIB, DeviceKind.HOST: 4 * MIB}

log = logging.getLogger("conductor")


@dataclass(frozen=True, slots=True)
class Moved:
    place: KvPlace
    elapsed_s: float


class Engine:
    """Start it once in a process: it takes the device, and page-locked host memory on CUDA."""

    def __init__(self, config: Config) -> None:
        llama = self._llama = Llama.instance()
        #: booked by other tasks, which may have taken them, or not yet
        self.external_bytes = 0
        self.threads = config.threads or _physical_cores()
        self._models = Models(llama, index=config.device.index)
        self._pools = Pools(
            threads=self.threads,
            threads_each=config.threads_per_context or self.threads,
            max_stall_s=config.max_stall_ms / 1000,
        )
        self.estimator = Estimator(index=config.device.index)
        self.device: Device = open_device(
            config.device,
            llama_supports_gpu=llama.supports_gpu,
            used_bytes=self.used_bytes,
            margin_bytes=self._margin_bytes,
        )
        self.overhead_bytes = self._touch_device()
        arena, pinned = llama.pinned(config.host_budget)
        self._saved = SavedKv(KvStore(arena, pinned=pinned, disk=_disk(config)))
        self._models.link_bytes_per_s = self._measure_link() if config.home_budget else 0.0
        self._prompt_threads = ThreadPoolExecutor(_PROMPT_THREADS, thread_name_prefix="prompt")
        self._kv_threads = ThreadPoolExecutor(_KV_THREADS, thread_name_prefix="kv")
        self._seats = Seats(self._saved, self._kv_threads)
        self._turns = Turns(self._prompt_threads)

    def _touch_device(self) -> int:
        """Bytes that the process takes on a GPU before it holds any model: the CUDA context and its libraries."""
        if self.device.kind is DeviceKind.HOST:
            return 0
        self._llama.touch_device()
        taken = self.device.taken_bytes()
        self.device.claim(taken)
        return taken

    def _measure_link(self) -> float:
        """Bytes a second from host memory to the device; 0 where there is no room to try."""
        try:
            return measure_link(self.device.kind, bytes=_PROBE_BYTES[self.device.kind])
        except LlamaError as error:
            log.warning("weights stay where they are loaded: %s", error)
            return 0.0

    def close(self) -> None:
        for threads in (self._prompt_threads, self._kv_threads):
            threads.shutdown()
        self._pools.end()
        self._models.close()
        self.estimator.close()
        self._saved.close()

    # --- what it is and takes ---------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        return self._llama.version

    def used_bytes(self) -> int:
        """What models and contexts hold on the device, by llama.cpp's own account."""
        return self._models.weights_bytes + self._pools.used_bytes

    def _margin_bytes(self) -> int:
        """What may be held beyond that account: kernels that are loaded late, contexts' temporary buffers, other tasks' bytes."""
        return sum(bytes for _, bytes in margins(self.device.kind)) + self._pools.temporary_bytes + self.external_bytes

    def pool_bytes(self, geometry: Geometry, spec: ContextSpec) -> int:
        """What a context takes on a GPU beside what llama.cpp accounts for."""
        return temporary_bytes(self.device, geometry, spec)

    def priced(self, geometry: Geometry, spec: ContextSpec, took: Footprint) -> Footprint:
        """By llama.cpp's account, as it is booked: with what the driver rounds up, and with the context's own pool."""
        return priced(self.device, geometry, spec, took)

    @property
    def link_bytes_per_s(self) -> float:
        """From host memory to the device, measured; 0 if nothing streams here."""
        return self._models.link_bytes_per_s

    def host_memory(self) -> HostMemoryStatus:
        return self._saved.status()

    # --- models and pools -------------------------------------------------------------------------------------------

    def load(self, plan: ModelPlan, placement: Placement | None = None) -> int:
        """Load the weights, or bring that part of them from their home; returns what they really take. Raises ModelLoadFailed."""
        return self._models.load(plan, self.device, placement)

    def is_at_home(self, model_id: ModelId) -> bool:
        """Whether its weights are in host memory, ready to be brought to the device."""
        return self._models.is_at_home(model_id)

    def unload(self, model_id: ModelId, keep_home: bool = False) -> float | None:
        """Free the weights' place on the device and, unless it is kept, their home.

        Returns what a step's computation took while layers streamed, in s; None if none did.
        """
        return self._models.unload(model_id, self.device, keep_home=keep_home)

    def weights(self, model_id: ModelId) -> WeightsStatus | None:
        """Where its weights are, and what passed through its ring; None of weights that have no home."""
        return self._models.status(model_id)

    def open_pool(self, pool_id: PoolId, model_id: ModelId, spec: ContextSpec, *, for_agent: AgentId) -> int | None:
        """Make a context with `spec.slots` seats and start its thread. Raises DecodeFailed.

        Returns what it takes in bytes, None where this llama.cpp does not tell.
        """
        return self._pools.open(pool_id, model_id, self._models[model_id], spec, self.device, for_agent=for_agent)

    def close_pool(self, pool_id: PoolId) -> None:
        """End the thread and free the context. Raises InternalError if somebody has a seat in it."""
        self._pools.close(pool_id, self.device)

    # --- seats and saved KV -----------------------------------------------------------------------------------------

    def take_seat(self, agent_id: AgentId, pool_id: PoolId) -> Future[int]:
        """A free slot, and the agent's saved KV in it. Bytes restored; 0 for a new conversation, or one to be recomputed.

        Where the future raises, what was saved is kept.
        """
        return self._seats.take(agent_id, self._pools[pool_id])

    def leave_seat(self, agent_id: AgentId, *, to: KvPlace) -> Future[Closed]:
        """Free the agent's slot, its KV saved to host memory or disk if there is room; TOKENS drops it."""
        return self._seats.leave(agent_id, to=to)

    def copy_kv(self, source: AgentId, new: AgentId, *, to: KvPlace) -> Future[Closed]:
        """`new` has the conversation of `source`, which is between two turns, from now on; its KV too if `to` is HOST."""
        return self._seats.copy(source, new, to=to)

    def state_bytes(self, agent_id: AgentId) -> int:
        """What the KV of a seated agent takes at most if it is saved before the next turn."""
        return self._seats.state_bytes(agent_id)

    def move_kv(self, agent_id: AgentId) -> Moved:
        """Move the agent's saved KV from host memory to disk; where that fails it is dropped."""
        began_at = time.monotonic()
        if self._saved.move_to_disk(agent_id):
            return Moved(KvPlace.DISK, time.monotonic() - began_at)
        self._seats.lost_kv(agent_id)
        return Moved(KvPlace.TOKENS, 0.0)

    def drop_kv(self, agent_id: AgentId) -> None:
        """Forget the agent's saved KV, at once."""
        self._saved.drop(agent_id)
        self._seats.lost_kv(agent_id)

    # --- turns ------------------------------------------------------------------------------------------------------

    def run_turn(self, order: TurnOrder) -> Future[TurnEnd]:
        """Begin a turn, or go on with the one that stands still, in the agent's seat; it joins the pool's next step.

        The future raises InvalidRequest, ChatTemplateFailed, WindowFull, TurnCancelled, DecodeFailed, or what `emit` raised.
        """
        taken = self._seats.of(order.agent_id)
        return self._turns.run(order, taken.pool.pool, taken.seat, taken.pool.loaded.prompter)

    def stop_turn(self, agent_id: AgentId, reason: FinishReason) -> None:
        """The running turn ends after the step it is in; before its first token, with TurnCancelled."""
        self._turns.stop(agent_id, reason)

    def pause_turn(self, agent_id: AgentId) -> None:
        """The running turn stands still after the step it is in, whole, and goes on with the next order for its request."""
        self._turns.pause(agent_id)

    def hold_turn(self, agent_id: AgentId, held: bool) -> None:
        """A held turn keeps its seat and takes part in no step until it is released."""
        self._turns.hold(agent_id, held)

    def end_turn(self, agent_id: AgentId, reason: FinishReason) -> TurnOutcome | None:
        """A turn that stands still ends with what it made. None if that is nothing: the session is as it was before.

        Raises what handing on the last of its text raises; it is ended all the same.
        """
        return self._turns.end(agent_id, reason)

    def drop_turn(self, agent_id: AgentId) -> int:
        """A turn that stands still goes on no more: the session is as it was before. Returns its tokens."""
        self._turns.drop(agent_id)
        return self.tokens(agent_id)

    def suspended_text(self, agent_id: AgentId) -> str:
        """What the agent's turn had made when it had to stand still."""
        return self._turns.suspended_text(agent_id)

    def progress(self) -> dict[AgentId, int]:
        """What each running turn has decoded so far, of prompt and answer together, in tokens."""
        return self._turns.progress()

    def tokens(self, agent_id: AgentId) -> int:
        """How many tokens the agent's conversation holds."""
        return self._seats.tokens(agent_id)

    def forget(self, agent_id: AgentId) -> None:
        """Drop the agent's conversation, its turn if one stands still, and its saved KV."""
        self._turns.drop(agent_id)
        self._seats.forget(agent_id)
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
