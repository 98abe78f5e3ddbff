"""Models whose weights are on the device, by id, and what they and their contexts take there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from conductor.backend.catalog import pinned
from conductor.backend.conversation import Prompter
from conductor.backend.device import Device
from conductor.backend.llama import Llama, LlamaError, Model
from conductor.core.estimate import Footprint, Geometry, ModelPlan
from conductor.core.pool import MOST_MULTIPROCESSORS, on_gpu, pool_bytes
from conductor.errors import ModelLoadFailed
from conductor.types import ContextSpec, DeviceKind, ModelId

#: to ask a loaded model what its weights take
_SMALLEST = ContextSpec(window=256, n_batch=1, n_ubatch=1)


@dataclass(slots=True)
class Loaded:
    model: Model
    prompter: Prompter
    geometry: Geometry
    weights_bytes: int


class Models:
    def __init__(self, llama: Llama, *, index: int) -> None:
        self._llama, self._index = llama, index
        self._loaded: dict[ModelId, Loaded] = {}

    def __getitem__(self, model_id: ModelId) -> Loaded:
        return self._loaded[model_id]

    @property
    def weights_bytes(self) -> int:
        return sum(loaded.weights_bytes for loaded in list(self._loaded.values()))

    def load(self, plan: ModelPlan, device: Device) -> int:
        """Load the weights; returns what they really take. Raises ModelLoadFailed."""
        with device.moving():
            model, measured = self._load(plan, device.kind)
            weights = rounded(device, measured, plan.geometry).weights_bytes if measured else plan.weights_bytes
            self._loaded[plan.id] = Loaded(model, Prompter(model), plan.geometry, weights)
        return weights

    def _load(self, plan: ModelPlan, kind: DeviceKind) -> tuple[Model, Footprint | None]:
        try:
            with pinned(plan) as path:  # loaded again after it was parked, or only now, much later
                model = self._llama.load(path, kind, index=self._index, name=Path(plan.path).name)
        except LlamaError as error:
            raise ModelLoadFailed(plan.path, str(error)) from error
        try:
            return model, model.footprint(_SMALLEST)
        except LlamaError as error:
            model.close()
            raise ModelLoadFailed(plan.path, f"no context can be made for it: {error}") from error

    def unload(self, model_id: ModelId, device: Device) -> None:
        with device.moving():
            loaded = self._loaded.pop(model_id)
            loaded.prompter.close()
            loaded.model.close()

    def close(self) -> None:
        for loaded in self._loaded.values():
            loaded.prompter.close()


def rounded(device: Device, took: Footprint, geometry: Geometry) -> Footprint:
    """As a GPU's driver hands it out."""
    return took if device.kind is DeviceKind.HOST else on_gpu(took, geometry)


def temporary_bytes(device: Device, geometry: Geometry, spec: ContextSpec) -> int:
    """What a context takes on a GPU beside what llama.cpp accounts for."""
    if device.kind is DeviceKind.HOST:
        return 0
    return pool_bytes(geometry, spec, multiprocessors=device.multiprocessors or MOST_MULTIPROCESSORS)


def priced(device: Device, geometry: Geometry, spec: ContextSpec, took: Footprint) -> Footprint:
    """By llama.cpp's account, as it is booked: with what the driver rounds up, and with the context's temporary buffers."""
    by_driver = rounded(device, took, geometry)
    return replace(by_driver, compute_bytes=by_driver.compute_bytes + temporary_bytes(device, geometry, spec))
