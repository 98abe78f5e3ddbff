"""A model's weight tensors by name, and where their bytes are: read, and moved, in ggml's own structs.

llama.cpp has no call that lists a model's tensors or moves one. This reads `llama_internal_get_tensor_map`, a C++ function that
the library exports, and the struct behind `ggml_tensor *`. Both are held against ggml's public accessors for every tensor of
every model before anything is written (`Unmovable` says what differs). Verified with llama-cpp-python 0.3.36 on Linux.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as ll

from conductor.backend.llama.binding import LlamaError, function

_TENSOR_MAP = "_Z29llama_internal_get_tensor_mapB5cxx11PK11llama_model"

_get_data = function("ggml_get_data", ctypes.c_void_p, ctypes.c_void_p)
_get_name = function("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p)
_n_bytes = function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
_type_of = function("ggml_backend_buffer_get_type", ctypes.c_void_p, ctypes.c_void_p)
_alloc_bytes = function("ggml_backend_buft_get_alloc_size", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p)
_is_host = function("ggml_backend_buft_is_host", ctypes.c_bool, ctypes.c_void_p)
_copy_out = function("ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


class Unmovable(LlamaError):
    """This llama.cpp, or this model, does not let its weights be moved; the message says why."""


class TensorStruct(ctypes.Structure):
    """`struct ggml_tensor`."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


NAME_OFFSET = TensorStruct.name.offset


def struct_at(address: int) -> TensorStruct:
    return TensorStruct.from_address(address)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight tensor. Its bytes are where `buffer` and `data` of its struct say."""

    name: str
    address: int  #: of its struct
    bytes: int

    @property
    def buffer(self) -> int:
        return int(struct_at(self.address).buffer)

    @property
    def is_in_host_memory(self) -> bool:
        return bool(_is_host(_type_of(self.buffer)))

    def room(self, memory_type: Any) -> int:
        """What it takes in a buffer of that type: quantised rows are padded for a GPU."""
        return int(_alloc_bytes(memory_type, self.address))

    def copy_out(self, target: int) -> None:
        """Its bytes, wherever they are, to an address in host memory."""
        _copy_out(self.address, target, 0, self.bytes)

    def place(self) -> tuple[int, int]:
        """(buffer, address of its bytes)"""
        struct = struct_at(self.address)
        return int(struct.buffer), int(struct.data)

    def move_to(self, buffer: int, data: int) -> None:
        """From now on its bytes are there. Nothing may be computing with it."""
        struct = struct_at(self.address)
        struct.buffer, struct.data = buffer, data


class _String(ctypes.Structure):  # libstdc++'s std::string
    _fields_ = [("text", ctypes.c_void_p), ("length", ctypes.c_size_t), ("local", ctypes.c_char * 16)]


class _Entry(ctypes.Structure):  # std::pair<std::string, ggml_tensor *>
    _fields_ = [("name", _String), ("tensor", ctypes.c_void_p)]


class _Vector(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("capacity", ctypes.c_void_p)]


def can_list() -> bool:
    """Whether this llama.cpp tells a model's tensors at all."""
    return hasattr(ll._lib, _TENSOR_MAP)


def weights_of(model: Any) -> list[Weight]:
    """All weight tensors of a loaded model, each once. Raises Unmovable if structs are not what they are taken for."""
    if not can_list():
        raise Unmovable(f"this llama.cpp does not export {_TENSOR_MAP}")
    found = {address: name for name, address in _listed(model)}  # tied tensors may be listed under one name, and are two
    return [_verified(name, address) for address, name in found.items()]


def _listed(model: Any) -> Iterator[tuple[str, int]]:
    get = function(_TENSOR_MAP, ctypes.POINTER(_Vector), ctypes.c_void_p)
    vector = get(model).contents
    length = (vector.end or 0) - (vector.begin or 0)
    if length <= 0 or length % ctypes.sizeof(_Entry):
        raise Unmovable("llama.cpp's list of tensors is laid out otherwise than expected")
    for entry in (_Entry * (length // ctypes.sizeof(_Entry))).from_address(vector.begin):
        if not 0 < entry.name.length < 64 or not entry.name.text or not entry.tensor:
            raise Unmovable("llama.cpp's list of tensors is laid out otherwise than expected")
        yield ctypes.string_at(entry.name.text, entry.name.length).decode("utf-8", "replace"), int(entry.tensor)


def _verified(name: str, address: int) -> Weight:
    """As ggml's accessors see it, so the struct is what it is taken for."""
    struct, size = struct_at(address), int(_n_bytes(address))
    agrees = (
        struct.name == _get_name(address) == name.encode()
        and struct.data == _get_data(address)
        and struct.buffer
        and struct.data
        and not struct.view_src
        and struct.nb[3] * struct.ne[3] == size
    )
    if not agrees:
        raise Unmovable(f"the tensor {name} is laid out otherwise than expected")
    return Weight(name, address, size)
