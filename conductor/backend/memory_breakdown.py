"""What llama.cpp itself says a context and its model take, by buffer type.

llama.cpp exports `llama_get_memory_breakdown` as a C++ function that returns a std::map; this walks libstdc++'s
red-black tree. Where the symbol is missing (another llama.cpp, libc++) `available` is False. Verified with
llama-cpp-python 0.3.36 on Linux; see upstream's src/llama-ext.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conductor.core.estimate import Footprint
from conductor.types import DeviceKind

_SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"


class _Sizes(ctypes.Structure):
    _fields_ = [("model", ctypes.c_size_t), ("context", ctypes.c_size_t), ("compute", ctypes.c_size_t)]


class _Node(ctypes.Structure):
    pass


_Node._fields_ = [
    ("color", ctypes.c_int),
    ("parent", ctypes.POINTER(_Node)),
    ("left", ctypes.POINTER(_Node)),
    ("right", ctypes.POINTER(_Node)),
    ("buffer_type", ctypes.c_void_p),
    ("sizes", _Sizes),
]


class _Map(ctypes.Structure):
    _fields_ = [
        ("compare", ctypes.c_size_t),
        ("color", ctypes.c_int),
        ("root", ctypes.POINTER(_Node)),
        ("leftmost", ctypes.c_void_p),
        ("rightmost", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    ]


@dataclass(slots=True)
class _Sum:
    weights: int = 0
    kv: int = 0
    compute: int = 0

    def add(self, sizes: _Sizes) -> None:
        self.weights += sizes.model
        self.kv += sizes.context
        self.compute += sizes.compute


class MemoryBreakdown:
    def __init__(self, lib: Any) -> None:
        self._get = getattr(lib, _SYMBOL, None)
        try:
            self._delete = ctypes.CDLL("libstdc++.so.6")._ZdlPv
        except (OSError, AttributeError):
            self._get = None
        if self._get is None:
            return
        self._get.argtypes, self._get.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
        self._delete.argtypes, self._delete.restype = [ctypes.c_void_p], None
        self._is_host = lib.ggml_backend_buft_is_host
        self._is_host.argtypes, self._is_host.restype = [ctypes.c_void_p], ctypes.c_bool

    @property
    def available(self) -> bool:
        return self._get is not None

    def of(self, context: Any, kind: DeviceKind) -> Footprint:
        """Sums over the buffers: those on the device, and beside a GPU those in host memory."""
        on_device, beside = _Sum(), _Sum()
        for is_host, sizes in self._buffers(context):
            (beside if is_host and kind is DeviceKind.CUDA else on_device).add(sizes)
        return Footprint(
            on_device.weights, on_device.kv, on_device.compute,
            host_weights_bytes=beside.weights, host_context_bytes=beside.kv + beside.compute,
        )  # fmt: skip

    def _buffers(self, context: Any) -> Iterator[tuple[bool, _Sizes]]:
        """For each type of buffer: whether it is host memory, and what is in it."""
        tree = _Map()
        self._get(ctypes.byref(tree), context)  # type: ignore[misc]
        nodes, pending = [], ([tree.root] if tree.count else [])
        while pending:
            if pointer := pending.pop():
                nodes.append(pointer.contents)
                pending += [pointer.contents.left, pointer.contents.right]
        for node in nodes:
            yield bool(self._is_host(node.buffer_type)), node.sizes
        for address in [ctypes.addressof(node) for node in nodes]:  # the map is ours to free
            self._delete(address)
