"""Without a GPU: two threads, one that copies and one that computes, in NumPy, which lets go of the interpreter meanwhile.

The "device" is memory of the same kind, so both lanes share its bandwidth: the overlap is real, the hiding less complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from actors.layers.lanes import Step
from actors.layers.spec import COLUMNS, SUMS, Compute, LayerStreamSpec
from actors.layers.times import Interval
from actors.layers.work import Factors, Floats, activations

#: Of a sweep's working copy: what stays in a core's own cache.
_BLOCK_ELEMENTS = 1 << 15


class _HostStep:
    def __init__(self, lane: ThreadPoolExecutor, work: Callable[[], None], *, after: Step | None, zero_s: float) -> None:
        self._work, self._after, self._zero_s = work, after, zero_s
        self._ended: Future[Interval] = lane.submit(self._run)

    def _run(self) -> Interval:
        if self._after is not None:
            self._after.wait()
        began = time.perf_counter()
        self._work()
        return Interval((began - self._zero_s) * 1000, (time.perf_counter() - self._zero_s) * 1000)

    def wait(self) -> None:
        self._ended.result()

    def interval(self) -> Interval:
        return self._ended.result()


class HostLanes:
    """See `Lanes`."""

    device = "host (NumPy, 2 threads)"

    def __init__(self, spec: LayerStreamSpec) -> None:
        self._spec = spec
        self.weights: Floats = np.empty((spec.n_layers, spec.elements), np.float32)
        # Written once: the first touch of a page costs far more than a copy.
        self._buffers: Floats = np.zeros((spec.buffers, spec.elements), np.float32)
        self._results: Floats = np.zeros((spec.n_layers, spec.results), np.float32)
        n_strides = spec.elements // SUMS
        self._block: Floats = np.zeros((n_strides, max(64, _BLOCK_ELEMENTS // n_strides)), np.float32)
        self._transfer = ThreadPoolExecutor(1, thread_name_prefix="layer-transfer")
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="layer-compute")
        self._zero_s = 0.0
        self.prepare(spec.compute_iters)

    def prepare(self, iters: int) -> None:
        self._factors = Factors.of(iters)
        if self._spec.compute is Compute.MATMUL:
            self._columns, self._signs = activations(iters)
            self._product: Floats = np.zeros((self._spec.rows, iters), np.float32)

    def begin(self) -> None:
        self._results.fill(np.nan)
        self._zero_s = time.perf_counter()

    def copy(self, layer: int, *, buffer: int, after: Step | None = None) -> Step:
        work = lambda: np.copyto(self._buffers[buffer], self.weights[layer])
        return _HostStep(self._transfer, work, after=after, zero_s=self._zero_s)

    def compute(self, layer: int, *, buffer: int, after: Step | None = None) -> Step:
        do = self._multiply if self._spec.compute is Compute.MATMUL else self._sweep
        work = lambda: do(self._buffers[buffer], self._results[layer])
        return _HostStep(self._computing, work, after=after, zero_s=self._zero_s)

    def results(self) -> Floats:
        return self._results.copy()

    def close(self) -> None:
        for lane in (self._transfer, self._computing):
            lane.shutdown(cancel_futures=True)

    def _sweep(self, layer: Floats, results: Floats) -> None:
        strides, a, b = layer.reshape(-1, SUMS), self._factors.a, self._factors.b
        width = self._block.shape[1]
        for left in range(0, SUMS, width):
            block = self._block[:, : min(width, SUMS - left)]
            np.multiply(strides[:, left : left + width], a, out=block)
            block += b
            for _ in range(self._factors.iters - 1):
                block *= a
                block += b
            np.add.reduce(block, axis=0, out=results[left : left + width])

    def _multiply(self, layer: Floats, results: Floats) -> None:
        np.matmul(layer.reshape(-1, COLUMNS), self._columns, out=self._product)
        np.matmul(self._product, self._signs, out=results)
