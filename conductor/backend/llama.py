"""The only import of llama_cpp: models, contexts, sampling, all through the low-level C API.

Covers what one sequence in one context needs. Validates whatever would make llama.cpp abort the process. Knows nothing
of agents, ledgers or queues; a `Context` must be used by one thread at a time.

Every symbol comes from libllama itself: a wheel holds copies of libggml, and opening one of them by its own name gives
a second ggml with its own state. Verified with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as ll
import numpy as np
import numpy.typing as npt

from conductor.backend.deep_stack import on_a_deep_stack
from conductor.backend.memory_breakdown import MemoryBreakdown
from conductor.core.estimate import Footprint, batch_tokens, refusal, slot_cells, step_tokens
from conductor.types import ContextSpec, DecodeRequest, DeviceKind

ByteArray = npt.NDArray[np.uint8]

#: ggml_type of the KV types on offer; anything outside the enum aborts llama.cpp
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
_SEQUENCE = 0
_WARNING, _ERROR = 3, 4  # ggml_log_level; the package's own table is out of date
_TOKEN_ATTR_UNKNOWN, _TOKEN_ATTR_CONTROL = 1 << 0, 1 << 3


class LlamaError(Exception):
    """llama.cpp said no; the message is what it logged."""


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
        self._lib = ll._lib
        self.breakdown = MemoryBreakdown(self._lib)

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
        lib = self._lib
        by_type = _function(lib, "ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int)
        buffer_type = _function(lib, "ggml_backend_dev_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
        allocate = _function(lib, "ggml_backend_buft_alloc_buffer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        free = _function(lib, "ggml_backend_buffer_free", None, ctypes.c_void_p)
        device = by_type(_GPU_DEVICE)
        if device and (buffer := allocate(buffer_type(device), 1 << 20)):
            free(buffer)

    def pinned(self, size: int) -> tuple[ByteArray, bool]:
        """`size` bytes of host memory for the life of the process: (array, page-locked for the GPU or not)."""
        lib, base = self._lib, None
        by_type = _function(lib, "ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int)
        host_type = _function(lib, "ggml_backend_dev_host_buffer_type", ctypes.c_void_p, ctypes.c_void_p)
        allocate = _function(lib, "ggml_backend_buft_alloc_buffer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        name = _function(lib, "ggml_backend_buffer_name", ctypes.c_char_p, ctypes.c_void_p)
        get_base = _function(lib, "ggml_backend_buffer_get_base", ctypes.c_void_p, ctypes.c_void_p)
        device = by_type(_GPU_DEVICE)
        kind = host_type(device) if device else None
        buffer = allocate(kind, size) if kind else None
        if buffer and name(buffer).endswith(b"_Host"):  # else llama.cpp fell back to plain memory without a word
            base = get_base(buffer)
        if base is None:
            return np.empty(size, np.uint8), False
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)), True


_GPU_DEVICE = 1  # GGML_BACKEND_DEVICE_TYPE_GPU


def _function(lib: Any, name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
    function: Any = getattr(lib, name)
    function.restype, function.argtypes = restype, list(argtypes)
    return function  # type: ignore[no-any-return]


class Model:
    """Loaded weights and their vocabulary."""

    def __init__(self, llama: Llama, handle: Any, kind: DeviceKind, name: str) -> None:
        self.name = name
        self._llama, self._handle, self._kind = llama, handle, kind
        self._vocab = ll.llama_model_get_vocab(handle)
        self.n_vocab = int(ll.llama_vocab_n_tokens(self._vocab))
        self._pieces: dict[int, bytes] = {}

    def close(self) -> None:
        ll.llama_model_free(self._handle)
        self._handle = None

    def footprint(self, spec: ContextSpec, *, step: int | None = None) -> Footprint | None:
        """What the weights and a context take on the device; None if this llama.cpp does not tell. Raises LlamaError.

        `step`: as if so many tokens were in work at once, instead of what the parameters say.
        """
        context = Context(self._llama, self, self._handle, self._kind, spec, n_threads=1, step=step)
        try:
            return context.footprint()
        finally:
            context.close()

    def context(self, spec: ContextSpec, *, n_threads: int) -> Context:
        """A live context for `spec.slots` sequences. Raises LlamaError if it does not fit the device, or cannot be."""
        return Context(self._llama, self, self._handle, self._kind, spec, n_threads=n_threads)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`. `parse_special`: control strings such as <|im_end|> become their tokens."""
        raw = text.encode("utf-8")
        try:
            return on_a_deep_stack(len(raw), lambda: self._tokenize(raw, add_special, parse_special))
        except RuntimeError as error:
            raise LlamaError(f"a text of {len(raw)} bytes is too long to be tokenised here") from error

    def _tokenize(self, raw: bytes, add_special: bool, parse_special: bool) -> list[int]:
        room = len(raw) + 8
        while True:
            buffer = (ll.llama_token * room)()
            count = ll.llama_tokenize(self._vocab, raw, len(raw), buffer, room, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            room = -count

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; empty for control tokens."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._render(token, special=False)
        return known

    def _render(self, token: int, *, special: bool) -> bytes:
        if not 0 <= token < self.n_vocab:  # llama.cpp would abort
            raise LlamaError(f"token {token} is outside the vocabulary of {self.n_vocab}")
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = ll.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a turn."""
        return frozenset(token for token in range(self.n_vocab) if ll.llama_vocab_is_eog(self._vocab, token))

    @functools.cached_property
    def chat_template(self) -> str | None:
        raw = ll.llama_model_chat_template(self._handle, None)
        return raw.decode("utf-8", "replace") if raw else None

    @functools.cached_property
    def bos(self) -> str:
        return self._special(ll.llama_vocab_bos(self._vocab))

    @functools.cached_property
    def eos(self) -> str:
        return self._special(ll.llama_vocab_eos(self._vocab))

    @functools.cached_property
    def adds_bos(self) -> bool:
        return bool(ll.llama_vocab_get_add_bos(self._vocab))

    def _special(self, token: int) -> str:
        return self._render(token, special=True).decode("utf-8", "replace") if 0 <= token < self.n_vocab else ""

    @functools.cached_property
    def control_strings(self) -> tuple[str, ...]:
        """What a user's text must not be able to say as a control token, longest first.

        Not what the model's makers call user-defined: llama.cpp reads those as tokens in any text.
        """
        control = _TOKEN_ATTR_UNKNOWN | _TOKEN_ATTR_CONTROL
        tokens = (t for t in range(self.n_vocab) if ll.llama_vocab_get_attr(self._vocab, t) & control)
        return tuple(sorted({text for t in tokens if (text := self._special(t))}, key=len, reverse=True))


class Context:
    """A live `llama_context`. It may have room for several sequences; what is said of one here is said of the first."""

    def __init__(
        self,
        llama: Llama,
        model: Model,
        model_handle: Any,
        kind: DeviceKind,
        spec: ContextSpec,
        *,
        n_threads: int,
        step: int | None = None,
    ) -> None:
        if why := refusal(spec):
            raise LlamaError(why)
        params = ll.llama_context_default_params()
        params.n_ctx = spec.slots * slot_cells(spec)
        params.n_batch = batch_tokens(spec)
        params.n_ubatch = step or step_tokens(spec)
        params.n_seq_max = params.n_outputs_max = spec.slots  # fewer outputs than sequences abort the process
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = int(spec.flash_attention)
        params.type_k = params.type_v = KV_TYPES[spec.kv_type]
        params.swa_full = False
        params.offload_kqv = params.op_offload = kind is DeviceKind.CUDA
        handle = ll.llama_init_from_model(model_handle, params)
        if not handle:
            raise llama.complaint("llama_init_from_model returned nothing")
        self.model, self.handle = model, handle
        self._llama, self._kind = llama, kind
        self._memory = ll.llama_get_memory(handle)
        self._sliding_window = int(ll.llama_model_n_swa(model_handle))
        self._n_batch = int(ll.llama_n_batch(handle))
        self._tokens = (ll.llama_token * self._n_batch)()
        self._one = ll.llama_batch_get_one(self._tokens, 1)

    def close(self) -> None:
        ll.llama_free(self.handle)
        self.handle = None

    def footprint(self) -> Footprint | None:
        """What this context and its model take on the device; None if this llama.cpp does not tell."""
        breakdown = self._llama.breakdown
        return breakdown.of(self.handle, self._kind) if breakdown.available else None

    # --- decoding ---------------------------------------------------------------------------------------------------

    def feed(self, tokens: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> int:
        """Decode `tokens` after what is there, a batch at a time; returns how many before `stopped`. Raises LlamaError."""
        for start in range(0, len(tokens), self._n_batch):
            if stopped():
                return start
            part: Any = list(tokens[start : start + self._n_batch])
            self._tokens[: len(part)] = part
            self._decode(ll.llama_batch_get_one(self._tokens, len(part)))
        return len(tokens)

    def feed_one(self, token: int) -> None:
        """`feed` for a single token, without its Python: a tiny model makes thousands of these a second."""
        self._tokens[0] = token
        self._decode(self._one)

    def _decode(self, batch: Any) -> None:
        code = ll.llama_decode(self.handle, batch)
        if code != 0:
            meaning = {1: "no room in the KV cache", -1: "invalid batch"}
            raise self._llama.complaint(meaning.get(code, f"llama_decode gave {code}"))

    def synchronize(self) -> None:
        """Wait until what was decoded is computed: a GPU works on after `feed` has returned."""
        ll.llama_synchronize(self.handle)

    def sample(self, sampler: Sampler) -> int:
        """The next token, from the logits of the last one decoded."""
        return int(ll.llama_sampler_sample(sampler.chain, self.handle, -1))

    # --- the sequence's memory --------------------------------------------------------------------------------------

    def truncate(self, n_tokens: int) -> bool:
        """Forget all but the first `n_tokens`; False if this architecture cannot (the cache is then cleared)."""
        if self._holds_window_before(n_tokens) and ll.llama_memory_seq_rm(self._memory, _SEQUENCE, n_tokens, -1):
            return True
        self.clear()
        return n_tokens == 0

    def _holds_window_before(self, n_tokens: int) -> bool:
        """Sliding layers forget what left their window; cut back to before that, they would attend to nothing, silently."""
        if not self._sliding_window:
            return True
        return int(ll.llama_memory_seq_pos_min(self._memory, _SEQUENCE)) <= max(0, n_tokens - self._sliding_window)

    def clear(self) -> None:
        ll.llama_memory_clear(self._memory, True)

    @property
    def can_shift(self) -> bool:
        return bool(ll.llama_memory_can_shift(self._memory))

    def shift(self, start: int, end: int) -> None:
        """Drop the tokens from `start` to before `end` and move the later ones down."""
        ll.llama_memory_seq_rm(self._memory, _SEQUENCE, start, end)
        ll.llama_memory_seq_add(self._memory, _SEQUENCE, end, -1, start - end)

    def state_bytes(self) -> int:
        return int(ll.llama_state_seq_get_size(self.handle, _SEQUENCE))

    def save(self, buffer: ByteArray) -> None:
        """Copy the sequence's KV into `buffer`, which has `state_bytes()` bytes. Raises LlamaError."""
        written = ll.llama_state_seq_get_data(self.handle, _pointer(buffer), buffer.nbytes, _SEQUENCE)
        if written != buffer.nbytes:
            raise self._llama.complaint(f"saved {written} of {buffer.nbytes} bytes")

    def restore(self, buffer: ByteArray) -> bool:
        """Bring a saved KV back; False (and an empty sequence) if llama.cpp does not take it."""
        if ll.llama_state_seq_set_data(self.handle, _pointer(buffer), buffer.nbytes, _SEQUENCE) == buffer.nbytes:
            return True
        self.clear()
        return False


def _pointer(buffer: ByteArray) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class Sampler:
    """llama.cpp's sampler chain for one request; close it after use."""

    def __init__(self, request: DecodeRequest, seed: int) -> None:
        params = ll.llama_sampler_chain_default_params()
        self.chain = ll.llama_sampler_chain_init(params)
        if request.temperature == 0:
            links = [ll.llama_sampler_init_greedy()]
        else:
            links = [
                ll.llama_sampler_init_top_k(request.top_k),
                ll.llama_sampler_init_top_p(request.top_p, 1),
                ll.llama_sampler_init_min_p(request.min_p, 1),
                ll.llama_sampler_init_temp(request.temperature),
                ll.llama_sampler_init_dist(seed),
            ]
        for link in links:
            ll.llama_sampler_chain_add(self.chain, link)

    def close(self) -> None:
        ll.llama_sampler_free(self.chain)
        self.chain = None
