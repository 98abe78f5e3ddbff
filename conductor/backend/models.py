"""Models whose weights are on the device, by id, and what they and their contexts take there."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from conductor.backend.catalog import pinned
from conductor.backend.conversation import Prompter
from conductor.backend.device import Device
from conductor.backend.llama import Llama, LlamaError, Model, Passage, Unmovable
from conductor.core.estimate import Footprint, Geometry, ModelPlan
from conductor.core.pool import MOST_MULTIPROCESSORS, granules, on_gpu, pool_bytes
from conductor.core.streaming import Placement, placement_bytes
from conductor.errors import ModelLoadFailed
from conductor.types import ContextSpec, DeviceKind, ModelId, WeightsStatus

log = logging.getLogger("conductor")

#: to ask a loaded model what its weights take
_SMALLEST = ContextSpec(window=256, n_batch=1, n_ubatch=1)


@dataclass(slots=True)
class Loaded:
    model: Model
    prompter: Prompter
    geometry: Geometry
    weights_bytes: int  #: on the device; 0 while they are at home only


class Models:
    def __init__(self, llama: Llama, *, index: int) -> None:
        self._llama, self._index = llama, index
        #: from host memory to the device, measured
        self.link_bytes_per_s = 0.0
        self._loaded: dict[ModelId, Loaded] = {}

    def __getitem__(self, model_id: ModelId) -> Loaded:
        return self._loaded[model_id]

    @property
    def weights_bytes(self) -> int:
        return sum(loaded.weights_bytes for loaded in list(self._loaded.values()))

    def load(self, plan: ModelPlan, device: Device, placement: Placement | None = None) -> int:
        """Load the weights, or bring that part of them from their home, which is made if need be; returns what they really take.

        Raises ModelLoadFailed.
        """
        with device.moving():
            if placement is not None:
                return self._place(plan, placement, device)
            model, measured = self._load(plan, device.kind)
            weights = rounded(device, measured, plan.geometry).weights_bytes if measured else plan.weights_bytes
            self._loaded[plan.id] = Loaded(model, Prompter(model), plan.geometry, weights)
        return weights

    def _place(self, plan: ModelPlan, placement: Placement, device: Device) -> int:
        loaded = self._loaded.get(plan.id)
        try:
            if loaded is None:
                with pinned(plan) as path:
                    model = self._llama.load_movable(path, device.kind, index=self._index, name=Path(plan.path).name)
                loaded = self._loaded[plan.id] = Loaded(model, Prompter(model), plan.geometry, 0)
            weights = loaded.model.weights
            assert weights is not None
            if plan.blocks is None or len(weights.blocks.layer_bytes) != len(plan.blocks.layer_bytes):
                self.unload(plan.id, device)
                raise Unmovable("llama.cpp has another number of layers than the file")
            weights.place(placement)
        except Unmovable as error:
            if placement.streams:
                raise ModelLoadFailed(plan.path, f"its layers cannot stream: {error}") from error
            log.warning("%s stays whole on the device, or is loaded anew: %s", plan.key, error)
            return self.load(plan, device)
        except LlamaError as error:
            raise ModelLoadFailed(plan.path, str(error)) from error
        taken = placement_bytes(weights.blocks, placement)
        loaded.weights_bytes = granules(taken) if device.kind is DeviceKind.CUDA else taken
        return loaded.weights_bytes

    def status(self, model_id: ModelId) -> WeightsStatus | None:
        loaded = self._loaded.get(model_id)
        weights = loaded.model.weights if loaded is not None else None
        if weights is None:
            return None
        ring = weights.ring
        passage = ring.passage if ring is not None else Passage()
        return WeightsStatus(
            home_bytes=weights.blocks.home_bytes,
            pinned=weights.pinned,
            passes=passage.passes,
            moved_bytes=passage.bytes,
            stalled_s=passage.waited_s,
            link_share=passage.bytes / passage.elapsed_s / self.link_bytes_per_s if passage.elapsed_s else 0.0,
        )

    def is_at_home(self, model_id: ModelId) -> bool:
        loaded = self._loaded.get(model_id)
        return loaded is not None and loaded.model.weights is not None

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

    def unload(self, model_id: ModelId, device: Device, *, keep_home: bool = False) -> float | None:
        """Free what they take on the device and, unless it is kept, their home.

        Returns what a step's computation took while layers streamed, in s; None if none did.
        """
        with device.moving():
            loaded = self._loaded[model_id]
            weights, step_s = loaded.model.weights, None
            if weights is not None:
                step_s = weights.ring.passage.step_s if weights.ring is not None else None
                weights.park()
            loaded.weights_bytes = 0
            if weights is None or not keep_home:
                del self._loaded[model_id]
                loaded.prompter.close()
                loaded.model.close()
        return step_s

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
