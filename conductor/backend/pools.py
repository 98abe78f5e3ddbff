"""The live contexts: made, told apart by id, closed, and what they take on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from conductor.backend.device import Device
from conductor.backend.kv_seal import Label
from conductor.backend.llama import LlamaError
from conductor.backend.models import Loaded, rounded, temporary_bytes
from conductor.backend.pool import Pool
from conductor.backend.snapshots import Snapshots
from conductor.backend.thread_budget import ThreadBudget
from conductor.core.estimate import cache_bytes
from conductor.errors import DecodeFailed, InternalError
from conductor.types import AgentId, ContextSpec, DeviceKind, ModelId, PoolId


@dataclass(slots=True)
class OpenPool:
    pool: Pool
    loaded: Loaded
    model_id: ModelId
    spec: ContextSpec
    bytes: int
    temporary_bytes: int  #: that it may take on a GPU beside those

    def label(self, tokens: int) -> Label:
        """What a saved KV of so many tokens must be labelled with to be this context's."""
        return _label(self.model_id, self.spec, tokens)


class Pools:
    """`threads`: of the CPU, that steps on the host device share; each context uses `threads_each` of them, always."""

    def __init__(self, *, threads: int, threads_each: int, max_stall_s: float) -> None:
        self._threads_each, self._max_stall_s = min(threads, threads_each), max_stall_s
        self._budget = ThreadBudget(threads)
        self._snapshots = Snapshots()
        self._open: dict[PoolId, OpenPool] = {}

    def __getitem__(self, pool_id: PoolId) -> OpenPool:
        """Raises InternalError."""
        if pool_id not in self._open:
            raise InternalError(f"there is no pool {pool_id}")
        return self._open[pool_id]

    @property
    def used_bytes(self) -> int:
        return sum(pool.bytes for pool in list(self._open.values()))

    @property
    def temporary_bytes(self) -> int:
        return sum(pool.temporary_bytes for pool in list(self._open.values()))

    def open(
        self, pool_id: PoolId, model_id: ModelId, loaded: Loaded, spec: ContextSpec, device: Device, *, for_agent: AgentId
    ) -> int | None:
        """Make a context and its thread; what it takes in bytes, None where llama.cpp does not tell. Raises DecodeFailed."""
        if pool_id in self._open:
            raise InternalError(f"pool {pool_id} is open already")
        with device.moving():
            try:
                context = loaded.model.context(spec, n_threads=self._threads_each)
            except LlamaError as error:
                raise DecodeFailed(for_agent, f"its context could not be made: {error}") from error
            took = context.footprint()
            taken = rounded(device, took, loaded.geometry).context_bytes if took else 0
            temporary = temporary_bytes(device, loaded.geometry, spec)
            pool = Pool(
                pool_id,
                context,
                weights_bytes=loaded.weights_bytes,
                slot_bytes=cache_bytes(loaded.geometry, spec, device=device.kind) // spec.slots,
                max_stall_s=self._max_stall_s,
                budget=self._budget if device.kind is DeviceKind.HOST else None,
                n_threads=self._threads_each,
                snapshots=self._snapshots,
                label=functools.partial(_label, model_id, spec),
            )
            self._open[pool_id] = OpenPool(pool, loaded, model_id, spec, taken, temporary)
        return taken + temporary if took else None

    def close(self, pool_id: PoolId, device: Device) -> None:
        """Raises InternalError if somebody has a seat in it."""
        with device.moving():
            self[pool_id].pool.close()
            del self._open[pool_id]

    def end(self) -> None:
        """Nothing is opened any more."""
        self._snapshots.close()


def _label(model_id: ModelId, spec: ContextSpec, tokens: int) -> Label:
    return Label(model_id, spec.kv_type, spec.flash_attention, spec.slots, tokens)
