"""What llama.cpp really allocates, by its own account: the breakdown of a context's buffers.

The symbol is C++ (a `std::map` returned through a hidden pointer), so the red-black tree is walked by hand: libstdc++ only.
"""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as llama

from conductor.types import ContextSpec

KV_TYPES = {"f32": llama.GGML_TYPE_F32, "f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0, "q4_0": llama.GGML_TYPE_Q4_0}


class _Bytes(c.Structure):
    _fields_ = [("model", c.c_size_t), ("context", c.c_size_t), ("compute", c.c_size_t)]


class _Node(c.Structure):
    pass


_Node._fields_ = [
    ("color", c.c_int),
    ("parent", c.c_void_p),
    ("left", c.POINTER(_Node)),
    ("right", c.POINTER(_Node)),
    ("key", c.c_void_p),
    ("value", _Bytes),
]


class _Map(c.Structure):
    _fields_ = [
        ("compare", c.c_size_t),
        ("color", c.c_int),
        ("root", c.POINTER(_Node)),
        ("leftmost", c.c_void_p),
        ("rightmost", c.c_void_p),
        ("count", c.c_size_t),
    ]


@dataclass(frozen=True, slots=True)
class Breakdown:
    model_bytes: int
    context_bytes: int  #: KV cache and recurrent state
    compute_bytes: int


def breakdown(context: int) -> Breakdown:
    """Summed over the buffer types. The map's nodes (some 70 bytes) are not given back."""
    found = _Map()
    call = llama._lib["_Z26llama_get_memory_breakdownPK13llama_context"]
    call.argtypes, call.restype = [c.c_void_p, c.c_void_p], c.c_void_p
    call(c.byref(found), context)
    parts = list(_walk(found.root)) if found.count else []
    return Breakdown(sum(p.model for p in parts), sum(p.context for p in parts), sum(p.compute for p in parts))


def _walk(node: c._Pointer[_Node]) -> Iterator[_Bytes]:
    if node:
        yield node.contents.value
        yield from _walk(node.contents.left)
        yield from _walk(node.contents.right)


@contextmanager
def opened_model(path: Path, *, dry: bool = False) -> Iterator[int]:
    """A model handle on the CPU. `dry` allocates neither weights nor, in its contexts, KV and compute buffers."""
    _silence()
    params = llama.llama_model_default_params()
    params.n_gpu_layers, params.devices = 0, c.cast((c.c_void_p * 1)(None), c.c_void_p)
    params.no_alloc = dry
    params.load_mode = llama.LLAMA_LOAD_MODE_NONE  # a dry run aborts with mmap
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp refused {path}"
    try:
        yield model
    finally:
        llama.llama_model_free(model)


@contextmanager
def opened_context(model: int, spec: ContextSpec) -> Iterator[int]:
    """A context as the conductor makes them: one output and a cache for each slot, sliding caches no longer than need be."""
    params = llama.llama_context_default_params()
    params.n_ctx = -(-spec.window // 256) * 256 * spec.slots
    least = 3 * spec.slots if spec.slots > 1 else 1
    params.n_batch = max(least, min(spec.n_batch, spec.window * spec.slots))
    params.n_ubatch = max(least, min(spec.n_ubatch, params.n_batch))
    params.n_seq_max = params.n_outputs_max = spec.slots
    params.type_k = params.type_v = KV_TYPES[spec.kv_type]
    params.flash_attn_type = int(spec.flash_attention)
    params.swa_full = False
    context = llama.llama_init_from_model(model, params)
    assert context, f"llama.cpp refused {spec}"
    try:
        yield context
    finally:
        llama.llama_free(context)


def decode_slots(context: int, lengths: Mapping[int, int]) -> None:
    """In one batch, so many further tokens of each slot; the last of each is asked for its logits."""
    memory = llama.llama_get_memory(context)
    batch = llama.llama_batch_init(sum(lengths.values()), 0, 1)
    for slot, length in lengths.items():
        start = llama.llama_memory_seq_pos_max(memory, slot) + 1
        for position in range(start, start + length):
            i, batch.n_tokens = batch.n_tokens, batch.n_tokens + 1
            batch.token[i], batch.pos[i] = i % 100, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot
            batch.logits[i] = position == start + length - 1
    code = llama.llama_decode(context, batch)
    llama.llama_batch_free(batch)
    assert code == 0


def measure(model: int, spec: ContextSpec) -> Breakdown:
    with opened_context(model, spec) as context:
        return breakdown(context)


@functools.cache
def _silence() -> None:
    llama.llama_backend_init()
    llama.llama_log_set(_ignore, None)


@llama.llama_log_callback
def _ignore(level: int, text: bytes, user_data: object) -> None:
    pass
