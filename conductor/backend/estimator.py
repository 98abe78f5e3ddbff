"""What a model and a context will take, known before anything is loaded: exactly where llama.cpp can tell, else safely."""

from __future__ import annotations

from conductor.backend.dry_run import DryRun
from conductor.backend.llama import Llama
from conductor.core.estimate import Footprint, ModelPlan, compute_bytes, kv_bytes
from conductor.types import ContextSpec


class Estimator:
    """Blocking, and safe to call from many threads. Close it after use."""

    def __init__(self, *, index: int = 0) -> None:
        self._exact = Llama.instance().breakdown.available
        self._dry_run = DryRun(index=index)

    def estimate(self, plan: ModelPlan, spec: ContextSpec, *, at_most: int) -> Footprint:
        """Raises BadModelFile, ModelLoadFailed.

        What exceeds `at_most` by its weights and KV alone, which the formula knows exactly, is not run at all: llama.cpp
        need not see absurd windows.
        """
        kv = kv_bytes(plan.geometry, spec) + plan.geometry.recurrent_bytes_per_sequence
        if self._exact and plan.weights_bytes + kv <= at_most:
            return self._dry_run.measure(plan, spec)
        return Footprint(plan.weights_bytes, kv, compute_bytes(plan.geometry, spec, device=plan.device))

    @property
    def how(self) -> str:
        """Where the figures come from."""
        if self._exact:
            return "exact, by a dry run of llama.cpp"
        return "weights and KV exact, compute buffers by a formula on the safe side (this llama.cpp has no dry run)"

    def close(self) -> None:
        self._dry_run.close()
