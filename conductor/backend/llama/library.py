"""llama.cpp in this process: initialised once, its log kept, models loaded, host memory locked for the GPU."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from pathlib import Path

import llama_cpp.llama_cpp as ll
import numpy as np

from conductor.backend.llama.binding import ByteArray, LlamaError, function
from conductor.backend.llama.model import Model
from conductor.backend.memory_breakdown import MemoryBreakdown
from conductor.types import DeviceKind

_WARNING, _ERROR = 3, 4  # ggml_log_level; the package's own table is out of date
_GPU_DEVICE = 1  # GGML_BACKEND_DEVICE_TYPE_GPU


class Llama:
    """llama.cpp in this process: initialised once, with its log kept for error messages."""

    _lock = threading.Lock()
    _instance: Llama | None = None

    @classmethod
    def instance(cls) -> Llama:
        with cls._lock:
            if cls._instance is None:
                os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else an abort forks a debugger for seconds
                cls._instance = cls()
            return cls._instance

    def __init__(self) -> None:
        self._log: deque[str] = deque(maxlen=32)
        self._log_callback = ll.llama_log_callback(self._keep)  # referenced for the life of the process
        ll.llama_log_set(self._log_callback, None)
        ll.llama_backend_init()
        self.breakdown = MemoryBreakdown(ll._lib)

    def _keep(self, level: int, text: bytes, _: object) -> None:
        if level in (_WARNING, _ERROR):
            self._log.append(text.decode("utf-8", "replace").strip())

    def complaint(self, what: str) -> LlamaError:
        """An error that says what failed and what llama.cpp logged about it."""
        said = [line for line in self._log if line][-3:]
        self._log.clear()
        return LlamaError("; ".join(said) or what)

    @property
    def version(self) -> str:
        return str(ll.llama_version().decode())

    @property
    def supports_gpu(self) -> bool:
        return bool(ll.llama_supports_gpu_offload())

    def load(self, path: str, kind: DeviceKind, *, index: int = 0, dry: bool = False, name: str = "") -> Model:
        """Load a model's weights: all layers on the GPU, or all in RAM. Raises LlamaError.

        `dry`: lay everything out, allocate neither weights nor contexts; such a model can only tell its `footprint`.
        """
        self._log.clear()
        params = ll.llama_model_default_params()
        no_devices = (ctypes.c_void_p * 1)(None)
        if kind is DeviceKind.CUDA:
            params.n_gpu_layers, params.main_gpu, params.split_mode = -1, index, ll.LLAMA_SPLIT_MODE_NONE
        else:
            # Not memory-mapped: repacked weights would then exist twice, once in no one's books.
            params.n_gpu_layers, params.load_mode = 0, ll.LLAMA_LOAD_MODE_NONE
            params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
        if dry:
            params.no_alloc, params.load_mode = True, ll.LLAMA_LOAD_MODE_NONE
        handle = ll.llama_model_load_from_file(os.fsencode(path), params)
        if not handle:
            raise self.complaint("llama_model_load_from_file returned nothing")
        return Model(self, handle, kind, name or Path(path).name)

    def touch_device(self) -> None:
        """Make the CUDA context now, by allocating something, so that what it takes can be measured."""
        by_type = function("ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int)
        buffer_type = function("ggml_backend_dev_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
        allocate = function("ggml_backend_buft_alloc_buffer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        free = function("ggml_backend_buffer_free", None, ctypes.c_void_p)
        device = by_type(_GPU_DEVICE)
        if device and (buffer := allocate(buffer_type(device), 1 << 20)):
            free(buffer)

    def pinned(self, size: int) -> tuple[ByteArray, bool]:
        """`size` bytes of host memory for the life of the process: (array, page-locked for the GPU or not)."""
        base = None
        by_type = function("ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int)
        host_type = function("ggml_backend_dev_host_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
        allocate = function("ggml_backend_buft_alloc_buffer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        name = function("ggml_backend_buffer_name", ctypes.c_char_p, ctypes.c_void_p)
        get_base = function("ggml_backend_buffer_get_base", ctypes.c_void_p, ctypes.c_void_p)
        device = by_type(_GPU_DEVICE)
        kind = host_type(device) if device else None
        buffer = allocate(kind, size) if kind else None
        if buffer and name(buffer).endswith(b"_Host"):  # else llama.cpp fell back to plain memory without a word
            base = get_base(buffer)
        if base is None:
            return np.empty(size, np.uint8), False
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)), True
