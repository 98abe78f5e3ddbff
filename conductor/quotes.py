"""What a registration asks for, and what it would take: the agent's specification with every size of pool that it may need.

Blocks: files are read, and models laid out in a child process. Does not cover who is admitted (`core.state`).
"""

from __future__ import annotations

from dataclasses import replace

from conductor.backend.catalog import Catalog
from conductor.backend.engine import Engine
from conductor.config import Config
from conductor.core.estimate import (
    KV_BLOCKS,
    Footprint,
    ModelPlan,
    cache_bytes,
    first_rung,
    refusal,
    slot_steps,
    windows_ladder,
)
from conductor.core.events import AgentSpec, Rung
from conductor.errors import ModelLoadFailed
from conductor.types import ContextSpec, ServiceClass
from conductor.units import format_bytes


class Quotes:
    def __init__(self, config: Config, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self._catalog = Catalog(config)

    def plan(self, model: str) -> ModelPlan:
        """Raises UnknownModel and what a file that cannot be used raises."""
        return self._catalog.plan(model, self._engine.device.kind)

    def context(self, plan: ModelPlan, window: int | None) -> ContextSpec:
        """The parameters of an agent's whole window. Raises ModelLoadFailed for a KV type that the model cannot have."""
        spec = self._config.context_spec(plan.key, window or self._config.window(plan.key, plan.geometry.trained_window))
        block, _ = KV_BLOCKS[spec.kv_type]
        for size in (plan.geometry.head_dim_k, plan.geometry.head_dim_v):
            if size % block:  # llama.cpp would refuse it only when the context is made, after the agent was admitted
                problem = f"its head size of {size} cannot be cut into the blocks of {block} that {spec.kv_type} has"
                raise ModelLoadFailed(plan.path, problem)
        return spec

    def priced(self, spec: AgentSpec) -> AgentSpec:
        """With what pools take, for each window that it grows through and each number of slots. Raises ModelLoadFailed."""
        plan, context = spec.model, spec.context
        first = first_rung(plan.geometry, self._config.first_window(plan.key, context.window), context.window)
        windows = windows_ladder(first, context.window)
        steps = (1,) if spec.service_class is ServiceClass.GUARANTEED else slot_steps(self._config.slots(plan.key))
        every = (replace(context, window=window, slots=slots) for window in windows for slots in steps)
        shapes = [shape for shape in every if shape.slots == 1 or not refusal(shape)]
        device = self._engine.device.read().total_bytes
        took = self._engine.estimator.estimates(plan, shapes, at_most=device + (plan.weights_bytes if plan.blocks else 0))
        priced = {it: self._engine.priced(plan.geometry, it, footprint) for it, footprint in zip(shapes, took, strict=True)}
        ladder = tuple(_rung(window, priced) for window in windows)
        weights = priced[replace(context, slots=1)].weights_bytes
        return replace(spec, model=replace(plan, weights_bytes=weights), ladder=ladder)

    def warnings(self, spec: AgentSpec) -> tuple[str, ...]:
        warnings = []
        window, trained, key = spec.context.window, spec.model.geometry.trained_window, spec.model.key
        if window > trained:
            more = f"{window} tokens are more than the {trained} that {key} was trained with; expect worse answers"
            warnings.append(more)
        kv, budget = cache_bytes(spec.model.geometry, spec.context, device=spec.model.device), self._config.host_budget
        if kv > budget and spec.service_class is not ServiceClass.GUARANTEED:
            warnings.append(
                f"a full window has {format_bytes(kv)} of KV, host_budget is {format_bytes(budget)}: what does not "
                "fit there is recomputed when the agent comes back, slower and with other rounding"
            )
        return tuple(warnings)


def _rung(window: int, priced: dict[ContextSpec, Footprint]) -> Rung:
    bytes = {shape.slots: footprint.context_bytes for shape, footprint in priced.items() if shape.window == window}
    return Rung(window, bytes.pop(1), tuple(bytes.items()))
