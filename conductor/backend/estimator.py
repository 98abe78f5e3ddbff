"""What a model and a context will take, known before anything is loaded: exactly where llama.cpp can tell, else safely."""

from __future__ import annotations

import logging

from conductor.backend.dry_run import ChildFailed, DryRun
from conductor.backend.llama import Llama, LlamaError
from conductor.core.estimate import Footprint, ModelPlan, compute_bytes, kv_bytes
from conductor.errors import ModelLoadFailed
from conductor.types import ContextSpec, DeviceKind, ModelId

_log = logging.getLogger(__name__)


class Estimator:
    """Blocking; one thread at a time. Close it after use.

    On the host device the dry run's child tells the bytes. For a GPU the child only proves that llama.cpp survives the file;
    the GPU's own layout is then asked in this process, which has its CUDA context already.
    """

    def __init__(self, *, index: int = 0) -> None:
        self._index = index
        self._exact = Llama.instance().breakdown.available
        self._dry_run = DryRun()
        self._on_gpu: dict[tuple[ModelId, ContextSpec], Footprint] = {}

    def estimate(self, plan: ModelPlan, spec: ContextSpec, *, at_most: int) -> Footprint:
        """Raises BadModelFile, ModelLoadFailed.

        What exceeds `at_most` by its weights and KV alone, which the formula knows exactly, is not run at all: llama.cpp
        need not see absurd windows.
        """
        kv = kv_bytes(plan.geometry, spec) + plan.geometry.recurrent_bytes_per_sequence
        if self._exact and plan.weights_bytes + kv <= at_most:
            try:
                return self._measure(plan, spec)
            except ChildFailed as failure:
                _log.warning("no dry run, so the formula: %s", failure)
                self._exact = False
        return Footprint(plan.weights_bytes, kv, compute_bytes(plan.geometry, spec, device=plan.device))

    def _measure(self, plan: ModelPlan, spec: ContextSpec) -> Footprint:
        on_host = self._dry_run.measure(plan, spec)
        if plan.device is DeviceKind.HOST:
            return on_host
        if (plan.id, spec) not in self._on_gpu:
            self._on_gpu[plan.id, spec] = self._lay_out(plan, spec)
        return self._on_gpu[plan.id, spec]

    def _lay_out(self, plan: ModelPlan, spec: ContextSpec) -> Footprint:
        try:
            model = Llama.instance().load(plan.path, plan.device, index=self._index, dry=True)
            try:
                took = model.footprint(spec)
            finally:
                model.close()
        except LlamaError as error:
            raise ModelLoadFailed(plan.path, str(error)) from error
        if took is None:
            raise ChildFailed("this llama.cpp does not tell what it would take")
        return took

    @property
    def how(self) -> str:
        """Where the figures come from."""
        if self._exact:
            return "exact, by a dry run of llama.cpp"
        return "weights and KV exact, compute buffers by a formula on the safe side (no dry run here)"

    def close(self) -> None:
        self._dry_run.close()
