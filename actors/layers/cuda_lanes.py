"""On a GPU, through CuPy: a transfer and a compute stream, an event pair around each copy and each kernel. The only import of
cupy for the experiment.

Each lane is a stream; they wait for one another on the device, by events. Everything on the device is one allocation, so that
what was booked is what is taken, and the layers lie in one page-locked block, because only such memory is copied beside a kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from actors.layers.lanes import Step
from actors.layers.spec import COLUMNS, ELEMENT_BYTES, SUMS, Compute, LayerStreamSpec
from actors.layers.times import Interval
from actors.layers.work import Factors, Floats, activations

_THREADS = 256

#: One thread for each sum. The results are read by nobody on the device, but written, so the sweep cannot be left out.
_SWEEP = r"""
extern "C" __global__ void sweep(const float* __restrict__ layer, const long long elements, const float a, const float b,
                                 const int iters, float* __restrict__ sums) {
    const long long threads = (long long)gridDim.x * blockDim.x;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0.0f;
    for (long long i = thread; i < elements; i += threads) {
        float x = layer[i];
        #pragma unroll 16
        for (int k = 0; k < iters; ++k) x = fmaf(x, a, b);
        sum += x;
    }
    sums[thread] = sum;
}
"""


class _CudaStep:
    def __init__(self, stream: Any, work: Callable[[], None], *, after: Step | None, zero: Any) -> None:
        self._zero, self._begin, self.end = zero, cupy.cuda.Event(), cupy.cuda.Event()
        if isinstance(after, _CudaStep):
            stream.wait_event(after.end)
        with stream:
            self._begin.record(stream)
            work()
            self.end.record(stream)

    def wait(self) -> None:
        self.end.synchronize()

    def interval(self) -> Interval:
        begin, end = (float(cupy.cuda.get_elapsed_time(self._zero, event)) for event in (self._begin, self.end))
        return Interval(begin, end)


class CudaLanes:
    """See `Lanes`. `index`: of the GPU, as CUDA counts those that this process sees. `most_iters`: what `prepare` may ask for.

    Raises ImportError where CuPy finds no library that it needs, and CuPy's own errors.
    """

    def __init__(self, spec: LayerStreamSpec, *, index: int = 0, most_iters: int | None = None) -> None:
        self._spec = spec
        cupy.cuda.Device(index).use()
        name = cupy.cuda.runtime.getDeviceProperties(index)["name"]
        self.device = name.decode() if isinstance(name, bytes) else str(name)
        self._kernel = cupy.RawKernel(_SWEEP, "sweep")
        self._transfer, self._computing = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        self._zero = cupy.cuda.Event()
        most = most_iters or spec.compute_iters
        self._memory: Any = cupy.cuda.Memory(spec.device_bytes(most_iters=most))
        self._taken_bytes = 0
        self._buffers: Any = [self._array(spec.rows, COLUMNS) for _ in range(spec.buffers)]
        self._results: Any = self._array(spec.n_layers, spec.results)
        self._results_of: Any = list(self._results)  # a view for each layer: making one takes as long as launching a kernel
        if spec.compute is Compute.MATMUL:
            from cupy import cublas

            self._cublas: Any = cublas
            self._room: Any = [self._array(size * most) for size in (COLUMNS, spec.rows, 1)]
        # Not from CuPy's pool, which would take the next power of two.
        self._pinned: Any = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(spec.arena_bytes), 0)
        flat = np.frombuffer(self._pinned, np.float32, spec.n_layers * spec.elements)
        self.weights: Floats = flat.reshape(spec.n_layers, spec.elements)
        self.prepare(spec.compute_iters)

    def prepare(self, iters: int) -> None:
        self._factors = Factors.of(iters)
        if self._spec.compute is Compute.MATMUL:
            shapes = (COLUMNS, iters), (self._spec.rows, iters), (iters,)
            parts = zip(self._room, shapes, strict=True)
            self._columns, self._product, self._signs = (room[: int(np.prod(shape))].reshape(shape) for room, shape in parts)
            for array, values in zip((self._columns, self._signs), activations(iters), strict=True):
                array.set(values)
        cupy.cuda.runtime.deviceSynchronize()

    def begin(self) -> None:
        self._results.data.memset(0xFF, self._results.nbytes)  # all ones are a NaN
        cupy.cuda.runtime.deviceSynchronize()
        self._zero.record(self._transfer)

    def copy(self, layer: int, *, buffer: int, after: Step | None = None) -> Step:
        to, source = self._buffers[buffer].data.ptr, self.weights[layer].ctypes.data
        size, kind = self._spec.bytes_per_layer, cupy.cuda.runtime.memcpyHostToDevice
        work = lambda: cupy.cuda.runtime.memcpyAsync(to, source, size, kind, self._transfer.ptr)
        return _CudaStep(self._transfer, work, after=after, zero=self._zero)

    def compute(self, layer: int, *, buffer: int, after: Step | None = None) -> Step:
        do = self._multiply if self._spec.compute is Compute.MATMUL else self._sweep
        work = lambda: do(self._buffers[buffer], self._results_of[layer])
        return _CudaStep(self._computing, work, after=after, zero=self._zero)

    def results(self) -> Floats:
        cupy.cuda.runtime.deviceSynchronize()
        found: Floats = self._results.get()
        return found

    def close(self) -> None:
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):  # nothing may be freed that a lane still reads
            cupy.cuda.runtime.deviceSynchronize()
        self.weights = np.empty((0, 0), np.float32)
        self._buffers = self._results = self._results_of = self._room = self._columns = self._product = self._signs = None
        self._memory = self._pinned = None

    def _array(self, *shape: int) -> Any:
        """The next so many floats of the one allocation."""
        pointer = cupy.cuda.MemoryPointer(self._memory, self._taken_bytes)
        self._taken_bytes += int(np.prod(shape)) * ELEMENT_BYTES
        return cupy.ndarray(shape, np.float32, pointer)

    def _sweep(self, layer: Any, results: Any) -> None:
        of = self._factors
        arguments = (layer, np.int64(self._spec.elements), of.a, of.b, np.int32(of.iters), results)
        self._kernel((SUMS // _THREADS,), (_THREADS,), arguments)

    def _multiply(self, layer: Any, results: Any) -> None:
        self._cublas.gemm("N", "N", layer, self._columns, out=self._product)
        self._cublas.gemv("N", 1.0, self._product, self._signs, 0.0, results)
