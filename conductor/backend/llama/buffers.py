"""ggml's buffers: memory of a device, page-locked host memory, plain host memory; and the devices they are of."""

from __future__ import annotations

import ctypes
from typing import Any

from conductor.backend.llama.binding import LlamaError, function
from conductor.types import DeviceKind

_CPU_DEVICE, _GPU_DEVICE = 0, 1  # ggml_backend_dev_type
_WEIGHTS = 1  # ggml_backend_buffer_usage: an operation is computed where its weights are

_pointer, _size = ctypes.c_void_p, ctypes.c_size_t
_device_by_type = function("ggml_backend_dev_by_type", _pointer, ctypes.c_int)
_type_of_device = function("ggml_backend_dev_buffer_type", _pointer, _pointer)
_host_type_of_device = function("ggml_backend_dev_host_buffer_type", _pointer, _pointer)
_allocate = function("ggml_backend_buft_alloc_buffer", _pointer, _pointer, _size)
_free = function("ggml_backend_buffer_free", None, _pointer)
_base = function("ggml_backend_buffer_get_base", _pointer, _pointer)
_type = function("ggml_backend_buffer_get_type", _pointer, _pointer)
_bytes = function("ggml_backend_buffer_get_size", _size, _pointer)
_name = function("ggml_backend_buffer_name", ctypes.c_char_p, _pointer)
_use_for = function("ggml_backend_buffer_set_usage", None, _pointer, ctypes.c_int)

#: words of `struct ggml_backend_buffer` among which its type, its context and its size follow each other
_WORDS = 24


def device(kind: DeviceKind) -> Any:
    """ggml's device; None if there is none of that kind."""
    return _device_by_type(_GPU_DEVICE if kind is DeviceKind.CUDA else _CPU_DEVICE)


def memory_type(kind: DeviceKind) -> Any:
    """ggml's buffer type of the device's own memory. Raises LlamaError if there is no such device: ggml would abort."""
    found = device(kind)
    if found is None:
        raise LlamaError(f"there is no {kind.value} device")
    return _type_of_device(found)


class Buffer:
    """Memory of ggml's, until `free`. `handle` is what tensors in it refer to."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.base = int(_base(handle) or 0)
        self.bytes = int(_bytes(handle))
        #: page-locked; where that cannot be had, llama.cpp falls back to plain memory without a word
        self.pinned = bool(_name(handle).endswith(b"_Host"))

    @classmethod
    def on_device(cls, kind: DeviceKind, size: int) -> Buffer | None:
        """For weights; None if the device has no room for it, or there is none."""
        found = device(kind)
        return cls._allocated(_type_of_device(found), size) if found else None

    @classmethod
    def in_host_memory(cls, size: int, kind: DeviceKind = DeviceKind.CUDA) -> Buffer | None:
        """Page-locked where there is a GPU, which copies from it at the link's full rate; `pinned` tells."""
        gpu = device(DeviceKind.CUDA) if kind is DeviceKind.CUDA else None
        memory = (_host_type_of_device(gpu) if gpu else None) or _type_of_device(device(DeviceKind.HOST))
        return cls._allocated(memory, size)

    @classmethod
    def _allocated(cls, kind: Any, size: int) -> Buffer | None:
        handle = _allocate(kind, size)
        if not handle:
            return None
        _use_for(handle, _WEIGHTS)  # else llama.cpp takes embeddings at home for inputs, and copies them to the GPU each time
        return cls(handle)

    def free(self) -> None:
        """Idempotent."""
        _free(self.handle)
        self.handle = None


def evacuate(handle: Any, kind: DeviceKind) -> bool:
    """Free the memory of a buffer that llama.cpp owns and whose tensors were moved elsewhere; False if that cannot be done here.

    The buffer gets the memory of a tiny one instead, so that llama.cpp frees something when it frees the buffer. ggml has no call
    for that: what a buffer's memory hangs on is found beside its type, and the exchange is checked by ggml's own accessor.
    """
    tiny = Buffer.on_device(kind, 1)
    if tiny is None:
        return False
    large_at, tiny_at = _context_of(handle), _context_of(tiny.handle)
    if large_at is None or tiny_at is None:
        tiny.free()
        return False
    large_at.value, tiny_at.value = tiny_at.value, large_at.value
    if int(_base(handle) or 0) != tiny.base:
        large_at.value, tiny_at.value = tiny_at.value, large_at.value
        tiny.free()
        return False
    tiny.free()
    return True


def _context_of(handle: Any) -> ctypes.c_void_p | None:
    """The word of the buffer's struct that its memory hangs on: between its type and its size."""
    words = (ctypes.c_size_t * _WORDS).from_address(handle)
    kind, size = int(_type(handle)), int(_bytes(handle))
    for at in range(_WORDS - 2):
        if words[at] == kind and words[at + 2] == size:
            return ctypes.c_void_p.from_address(handle + (at + 1) * ctypes.sizeof(ctypes.c_size_t))
    return None
