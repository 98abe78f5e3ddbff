"""What the way between device and host memory gives: plain copies of a size, page-locked and pageable, both ways.

On CUDA by cudaMemcpyAsync from the CUDA runtime that is there, between device memory and a buffer of ggml's page-locked host
memory or plain memory; on the host device, whose memory is host memory too, by memmove.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np

from conductor.backend.llama import ByteArray, Llama
from conductor.types import DeviceKind

_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2  # cudaMemcpyKind


class Link:
    """Buffers of up to `size` bytes on both sides; close it. `pinned` is for others to save KV to as well."""

    def __init__(self, kind: DeviceKind, size: int) -> None:
        self.kind = kind
        self.pinned, self.is_pinned = Llama.instance().pinned(size)
        self.pageable = np.ones(size, np.uint8)  # written once: the first touch of a page costs far more than a copy
        self.pinned[:] = 1
        self._runtime: Any = None
        if kind is DeviceKind.HOST:
            self._plain = np.ones(size, np.uint8)
            self._device = self._plain.ctypes.data
        else:
            self._runtime, self._stream, self._device = _runtime(), ctypes.c_void_p(), _allocate(size)
            _ok(self._runtime.cudaStreamCreate(ctypes.byref(self._stream)))

    def close(self) -> None:
        if self._runtime is not None:
            _ok(self._runtime.cudaStreamDestroy(self._stream))
            _ok(self._runtime.cudaFree(ctypes.c_void_p(self._device)))

    def figures(self, size: int) -> dict[str, float]:
        """Milliseconds of a copy of so many bytes: to the host as a save goes, from it as a restore."""
        result: dict[str, float] = {}
        for name, buffer in (("pinned", self.pinned), ("pageable", self.pageable)):
            result[f"{name}_save_ms"] = self._timed(buffer, size, _DEVICE_TO_HOST)
            result[f"{name}_restore_ms"] = self._timed(buffer, size, _HOST_TO_DEVICE)
        return result

    def _timed(self, buffer: ByteArray, size: int, direction: int) -> float:
        host, device = buffer.ctypes.data, self._device
        to, source = (device, host) if direction == _HOST_TO_DEVICE else (host, device)
        began = time.perf_counter()
        if self._runtime is None:
            ctypes.memmove(to, source, size)
        else:
            copy = self._runtime.cudaMemcpyAsync
            _ok(copy(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), direction, self._stream))
            _ok(self._runtime.cudaStreamSynchronize(self._stream))
        return (time.perf_counter() - began) * 1000


def _runtime() -> Any:
    for name in _RUNTIMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"no CUDA runtime can be loaded: {', '.join(_RUNTIMES)}")


def _allocate(size: int) -> int:
    pointer = ctypes.c_void_p()
    _ok(_runtime().cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)))
    return pointer.value or 0


def _ok(code: int) -> None:
    assert code == 0, f"CUDA error {code}"
