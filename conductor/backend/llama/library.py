"""llama.cpp in this process: initialised once, its log kept, models loaded, host memory locked for the GPU."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from pathlib import Path

import llama_cpp.llama_cpp as ll
import numpy as np

from conductor.backend.llama.binding import ByteArray, LlamaError
from conductor.backend.llama.buffers import Buffer, memory_type
from conductor.backend.llama.model import Model
from conductor.backend.llama.movable import LAYER_PATTERN
from conductor.backend.llama.tensors import Unmovable
from conductor.backend.memory_breakdown import MemoryBreakdown
from conductor.types import DeviceKind

_WARNING, _ERROR = 3, 4  # ggml_log_level; the package's own table is out of date


class _Override(ctypes.Structure):  # struct llama_model_tensor_buft_override
    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


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

    def load_movable(self, path: str, kind: DeviceKind, *, index: int = 0, name: str = "") -> Model:
        """Load a model whose weights are at home in host memory, and nothing of them on the device, until they are placed.

        It may be larger than the device. Raises Unmovable where that cannot be done, LlamaError if it cannot be loaded.
        """
        if index:
            raise Unmovable("weights move to the first GPU that this process sees: name another by CUDA_VISIBLE_DEVICES")
        self._log.clear()
        params = ll.llama_model_default_params()
        params.use_extra_bufts = False  # what crosses the link are the bytes of the file
        params.load_mode = ll.LLAMA_LOAD_MODE_MMAP
        no_devices = (ctypes.c_void_p * 1)(None)
        in_host_memory = (_Override * 2)(_Override(LAYER_PATTERN.encode(), memory_type(DeviceKind.HOST)), _Override(None, None))
        if kind is DeviceKind.CUDA:
            params.n_gpu_layers, params.main_gpu, params.split_mode = -1, index, ll.LLAMA_SPLIT_MODE_NONE
            params.tensor_buft_overrides = ctypes.cast(in_host_memory, ctypes.c_void_p)
        else:
            params.n_gpu_layers, params.devices = 0, ctypes.cast(no_devices, ctypes.c_void_p)
        handle = ll.llama_model_load_from_file(os.fsencode(path), params)
        if not handle:
            raise self.complaint("llama_model_load_from_file returned nothing")
        try:
            return Model(self, handle, kind, name or Path(path).name, movable=True)
        except BaseException:
            ll.llama_model_free(handle)
            raise

    def touch_device(self) -> None:
        """Make the CUDA context now, by allocating something, so that what it takes can be measured."""
        if buffer := Buffer.on_device(DeviceKind.CUDA, 1 << 20):
            buffer.free()

    def pinned(self, size: int) -> tuple[ByteArray, bool]:
        """`size` bytes of host memory for the life of the process: (array, page-locked for the GPU or not)."""
        buffer = Buffer.in_host_memory(size)
        if buffer is not None and buffer.pinned:
            return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(buffer.base)), True
        if buffer is not None:
            buffer.free()
        return np.empty(size, np.uint8), False
