"""What all of the package needs of llama.cpp's library: its functions by name, its errors, its buffers' type.

Every symbol comes from libllama itself: a wheel holds copies of libggml, and opening one of them by its own name gives a
second ggml with its own state. Verified with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]

#: ggml_type of the KV types on offer; anything outside the enum aborts llama.cpp
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}

#: The same library, called without giving up the interpreter: for calls that return at once.
_QUICK = ctypes.PyDLL(ll._lib._name, handle=ll._lib._handle)


class LlamaError(Exception):
    """llama.cpp said no; the message is what it logged."""


def function(name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
    """A function of the library, as typed here whatever the binding says."""
    return _typed(ll._lib, name, restype, argtypes)


def quick(name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
    """One that returns in a microsecond: giving the interpreter up and asking for it again would take longer."""
    return _typed(_QUICK, name, restype, argtypes)


def _typed(library: Any, name: str, restype: Any, argtypes: tuple[Any, ...]) -> Callable[..., Any]:
    found: Any = library[name]  # by index: a new object each time, and the binding's own stays as it is
    found.restype, found.argtypes = restype, list(argtypes)
    return found  # type: ignore[no-any-return]


def pointer(buffer: ByteArray) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
