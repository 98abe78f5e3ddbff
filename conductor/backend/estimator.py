"""What a model and a context will take, known before anything is loaded: exactly where llama.cpp can tell, else safely."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from conductor.backend.dry_run import ChildFailed, DryRun, lay_out
from conductor.backend.file_identity import FileIdentity, file_identity
from conductor.backend.llama import Llama, LlamaError
from conductor.core.estimate import Footprint, ModelPlan, cache_bytes, predicted, refusal
from conductor.errors import ModelLoadFailed
from conductor.types import ContextSpec, DeviceKind

_log = logging.getLogger(__name__)

_Question: TypeAlias = "tuple[FileIdentity, DeviceKind, ContextSpec]"


class Estimator:
    """Blocking; one thread at a time. Close it after use.

    On the host device the dry run's child tells the bytes. For a GPU the child only proves that llama.cpp survives the file;
    the GPU's own layout is then asked in this process, which has its CUDA context already. The last `keep` answers are kept.
    """

    def __init__(self, *, index: int = 0, keep: int = 4096, dry_run: DryRun | None = None) -> None:
        self._index = index
        self._exact = Llama.instance().breakdown.available
        self._dry_run = dry_run or DryRun()
        self._keep = keep
        self._answers: OrderedDict[_Question, Footprint] = OrderedDict()

    def estimate(self, plan: ModelPlan, spec: ContextSpec, *, at_most: int) -> Footprint:
        """`ladder` of one window."""
        return self.ladder(plan, spec, [spec.window], at_most=at_most)[0]

    def ladder(self, plan: ModelPlan, spec: ContextSpec, windows: Sequence[int], *, at_most: int) -> tuple[Footprint, ...]:
        """What the same context takes with each of `windows`; as `estimates`."""
        return self.estimates(plan, [replace(spec, window=window) for window in windows], at_most=at_most)

    def estimates(self, plan: ModelPlan, specs: Sequence[ContextSpec], *, at_most: int) -> tuple[Footprint, ...]:
        """What each of these contexts takes. The model is laid out once; a context costs milliseconds.

        What exceeds `at_most` by its weights and KV alone, which the formula knows exactly, is not run at all: llama.cpp
        need not see absurd windows. Raises BadModelFile, ModelLoadFailed.
        """
        if why := next(filter(None, map(refusal, specs)), None):
            raise ModelLoadFailed(plan.path, why)
        sane = [spec for spec in specs if plan.weights_bytes + cache_bytes(plan.geometry, spec, device=plan.device) <= at_most]
        measured: dict[ContextSpec, Footprint] = {}
        if self._exact and sane:
            try:
                measured = self._measure(plan, sane)
            except ChildFailed as failure:
                _log.warning("no dry run, so the formula: %s", failure)
                self._exact = False
        return tuple(measured[spec] if spec in measured else predicted(plan, spec) for spec in specs)

    def _measure(self, plan: ModelPlan, specs: Sequence[ContextSpec]) -> dict[ContextSpec, Footprint]:
        identity = file_identity(plan)
        known = {spec: kept for spec in specs if (kept := self._recall((identity, plan.device, spec)))}
        missing = [spec for spec in dict.fromkeys(specs) if spec not in known]
        if missing:
            took = self._dry_run.measure(plan, identity, missing)
            if plan.device is DeviceKind.CUDA:
                took = self._on_gpu(plan, missing)
            for spec, footprint in zip(missing, took, strict=True):
                known[spec] = footprint
                self._remember((identity, plan.device, spec), footprint)
        return known

    def _recall(self, question: _Question) -> Footprint | None:
        if question in self._answers:
            self._answers.move_to_end(question)
        return self._answers.get(question)

    def _remember(self, question: _Question, answer: Footprint) -> None:
        self._answers[question] = answer
        if len(self._answers) > self._keep:
            self._answers.popitem(last=False)

    def _on_gpu(self, plan: ModelPlan, specs: Sequence[ContextSpec]) -> list[Footprint]:
        try:
            model = Llama.instance().load(plan.path, plan.device, index=self._index, dry=True)
            try:
                took = [lay_out(model, spec) for spec in specs]
            finally:
                model.close()
        except LlamaError as error:
            raise ModelLoadFailed(plan.path, str(error)) from error
        return took

    @property
    def exact(self) -> bool:
        """Whether llama.cpp itself tells the bytes of what is worth asking about."""
        return self._exact

    @property
    def how(self) -> str:
        """Where the figures come from."""
        if self._exact:
            return "exact, by a dry run of llama.cpp"
        return (
            "by a formula, since this llama.cpp cannot be run dry: weights and KV exact, compute buffers 1.0 to 1.6 times the "
            "real ones (to 1.9 if neither llama nor qwen2, to 2.8 on a GPU)"
        )

    def close(self) -> None:
        self._dry_run.close()
