"""The sides of the streaming benchmark: llama.cpp's decode over weights that are placed one way or another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt

from conductor.backend.llama import Context, Llama, Model
from conductor.backend.llama.movable import MovableWeights
from conductor.core.streaming import Placement, streamed_bytes
from conductor.types import ContextSpec, DeviceKind

PROMPT = (3, 5, 17, 33, 101)
_WARM_STEPS = 3
_SMALLEST = ContextSpec(window=256, n_batch=1, n_ubatch=1)


class Contexts(Protocol):
    def context(self, spec: ContextSpec, *, n_threads: int) -> Context: ...


@dataclass(slots=True)
class Decoding:
    """`batch` sequences, greedy, the same for every side; the first side's tokens and logits are what others are held against."""

    batch: int
    steps: int
    n_threads: int
    _reference: tuple[list[list[int]], npt.NDArray[np.float32]] | None = field(default=None)

    def figures(self, model: Contexts) -> dict[str, float]:
        spec = ContextSpec(window=256, slots=self.batch, n_batch=max(256, len(PROMPT) * self.batch), n_ubatch=256)
        context = model.context(spec, n_threads=self.n_threads)
        try:
            made, last, step_s = self._run(context)
        finally:
            context.close()
        if self._reference is None:
            self._reference = made, last
        equal = made == self._reference[0] and np.array_equal(last, self._reference[1])
        return {"step_ms": step_s * 1000, "equal": float(equal)}

    def _run(self, context: Context) -> tuple[list[list[int]], npt.NDArray[np.float32], float]:
        pending, position, made = [list(PROMPT) for _ in range(self.batch)], [0] * self.batch, list[list[int]]()
        began = 0.0
        for step in range(_WARM_STEPS + self.steps):
            if step == _WARM_STEPS:
                began = time.perf_counter()
            context.batch.clear()
            for slot, tokens in enumerate(pending):
                context.batch.add(tokens, position[slot], slot, output=True)
                position[slot] += len(tokens)
            context.decode()
            context.synchronize()
            made.append(context.likeliest(self.batch))
            # Sequences with the same past would say the same: each goes on with its own.
            pending = [[(token + slot) % context.model.n_vocab] for slot, token in enumerate(made[-1])]
        elapsed = time.perf_counter() - began
        return made, context.logits(self.batch).copy(), elapsed / self.steps


@dataclass(slots=True)
class Side:
    decoding: Decoding
    model: Any
    placement: Placement | None = None
    overlap: bool = True

    def __call__(self) -> dict[str, float]:
        if self.placement is not None:
            self.model.weights.place(self.placement, overlap=self.overlap)
        figures = self.decoding.figures(self.model)
        if self.placement is not None:
            ring = self.model.weights.ring
            if ring is not None:
                figures["waited"] = ring.passage.waited_s / ring.passage.elapsed_s
            self.model.weights.park()
        return figures


def copies_alone(weights: MovableWeights, placement: Placement, passes: int = 3) -> dict[str, float]:
    """The copies of a pass, one after another through the same ring, with nothing computed."""
    weights.place(placement)
    assert weights.ring is not None
    step_s = weights.ring.rehearse(passes)
    weights.park()
    return {"step_ms": step_s * 1000, "gb_per_s": streamed_bytes(weights.blocks, placement) / step_s / 1e9}


class Offloaded:
    """A model as llama.cpp's partial offload loads it: as many layers on the device as fit, the rest for the CPU to compute."""

    def __init__(self, path: str, budget_bytes: int, *, index: int, n_layers: int) -> None:
        params = ll.llama_model_default_params()
        params.main_gpu, params.split_mode = index, ll.LLAMA_SPLIT_MODE_NONE
        for layers in range(n_layers, -1, -1):
            params.n_gpu_layers = layers
            params.no_alloc, params.load_mode = True, ll.LLAMA_LOAD_MODE_NONE
            dry = self._load(path, params)
            took = dry.footprint(_SMALLEST)
            dry.close()
            if took is not None and took.weights_bytes <= budget_bytes:
                break
        params.no_alloc, params.load_mode = False, ll.LLAMA_LOAD_MODE_AUTO
        self._model = self._load(path, params)
        took = self._model.footprint(_SMALLEST)
        self.layers, self.device_bytes = layers, took.weights_bytes if took else 0

    def _load(self, path: str, params: Any) -> Model:
        handle = ll.llama_model_load_from_file(path.encode(), params)
        assert handle, f"llama.cpp does not load {path}"
        return Model(Llama.instance(), handle, DeviceKind.CUDA, "offloaded")

    def context(self, spec: ContextSpec, *, n_threads: int) -> Context:
        return self._model.context(spec, n_threads=n_threads)

    def close(self) -> None:
        self._model.close()
