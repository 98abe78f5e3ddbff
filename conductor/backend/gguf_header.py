"""What a model file says about itself: a `Geometry` and a few names, in milliseconds, without loading it.

Refuses, with a sentence, whatever llama.cpp would refuse late, die of or misread. Does not know which architectures
llama.cpp supports, and does not read weights. Where a layer's kind is in doubt it counts what takes more memory.
See also: `gguf_file.py`, the container; `core/estimate.py`, what follows from the geometry.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from conductor.backend.gguf_file import BLOCKS, STRING, Array, GgufFile, Malformed, Tensor, Value, aligned, parse, row_bytes
from conductor.core.estimate import F32_BYTES, Geometry
from conductor.errors import BadModelFile

MAX_LAYERS = 512  #: llama.cpp aborts above it
MAX_HEADS = 1 << 16
MAX_WIDTH = 1 << 24
MAX_WINDOW = 1 << 31

#: Tensors begin at multiples of these in ggml's buffers, and CUDA reads quantised rows up to a multiple of the third.
HOST_ALIGNMENT_BYTES = 32
GPU_ALIGNMENT_BYTES = 128
GPU_ROW_ELEMENTS = 512

TOKEN_EMBEDDINGS, OUTPUT = "token_embd.weight", "output.weight"

#: Architectures whose layers llama.cpp lets slide: all but every n-th. Others that could count as full, the larger.
SLIDING_PERIOD = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt-oss": 2}


@dataclass(frozen=True, slots=True)
class GgufHeader:
    architecture: str
    name: str | None
    geometry: Geometry
    has_chat_template: bool
    file_type: int | None  #: llama.cpp's number for the mix of tensor types
    metadata: Mapping[str, Value]


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Raises BadModelFile, and nothing else whatever the file holds."""
    shown = os.fsdecode(path)
    try:
        return _describe(_read(shown))
    except Malformed as error:
        raise BadModelFile(shown, str(error)) from None
    except OSError as error:
        raise BadModelFile(shown, f"cannot be read: {error.strerror or error}") from None


def _read(path: str) -> GgufFile:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: characters that no file name can have
        raise Malformed("no such file") from None
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
        raise Malformed("is a directory" if stat.S_ISDIR(mode) else "is not a regular file")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise Malformed("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return parse(content)


def _describe(file: GgufFile) -> GgufHeader:
    keys = _Keys(file.metadata)
    kind = keys.text("general.type", default="model")
    if kind != "model":
        raise Malformed(f"holds no language model but: {kind[:40]!r} (general.type)")
    if keys.integer("split.count", default=0, least=0) > 1:
        raise Malformed("is one part of a split model, which is not supported; join the parts with llama-gguf-split --merge")
    architecture = keys.text("general.architecture")
    if not file.tensors:
        raise Malformed("has no tensors (a vocabulary without a model)")
    name = file.metadata.get("general.name")
    file_type = file.metadata.get("general.file_type")
    return GgufHeader(
        architecture=architecture,
        name=name if isinstance(name, str) else None,
        geometry=_geometry(architecture, _Keys(file.metadata, prefix=f"{architecture}."), file.tensors),
        has_chat_template=isinstance(file.metadata.get("tokenizer.chat_template"), str),
        file_type=file_type if isinstance(file_type, int) else None,
        metadata=file.metadata,
    )


class _Keys:
    """Metadata by name, each value held against the type and the range it must have."""

    def __init__(self, metadata: Mapping[str, Value], *, prefix: str = "") -> None:
        self.metadata = metadata
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text", value)
        return value

    def integer(self, key: str, *, default: int | None = None, least: int = 1, most: int = MAX_WIDTH) -> int:
        return self._checked(key, self._value(key, default), least, most)

    def per_layer(self, key: str, n_layer: int, *, default: int | None = None, most: int = MAX_WIDTH) -> tuple[int, ...]:
        """One number for all layers, or a list with one for each."""
        value = self._value(key, default)
        if not isinstance(value, Array):
            return (self._checked(key, value, 0, most),) * n_layer
        if value.count != n_layer or value.values is None:
            raise Malformed(f"{self.prefix}{key} lists {value.count} values for {n_layer} layers")
        return tuple(self._checked(key, item, 0, most) for item in value.values)

    def check_epsilon(self, key: str) -> None:
        """llama.cpp aborts at the first token with a negative one."""
        if key not in self:
            return
        value = self._value(key, None)
        if not isinstance(value, float):
            raise self._wrong(key, "a fraction", value)
        if not math.isfinite(value) or value < 0:
            raise Malformed(f"{self.prefix}{key} must be a small number, not {value}")

    def _value(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise Malformed(f"the metadata key {self.prefix}{key} is missing")
        return value

    def _checked(self, key: str, value: Value, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number", value)
        if not least <= value <= most:
            raise Malformed(f"{self.prefix}{key} is {value}, not between {least} and {most}")
        return value

    def _wrong(self, key: str, wanted: str, value: Value) -> Malformed:
        found = "a list" if isinstance(value, Array) else repr(value)[:60]
        return Malformed(f"{self.prefix}{key} must be {wanted}, not {found}")


def _geometry(architecture: str, keys: _Keys, tensors: Mapping[str, Tensor]) -> Geometry:
    n_layer = keys.integer("block_count", most=MAX_LAYERS)
    n_embd = keys.integer("embedding_length")
    keys.check_epsilon("attention.layer_norm_rms_epsilon")
    keys.check_epsilon("attention.layer_norm_epsilon")
    state_bytes = _state_bytes(keys, n_embd)
    n_head, n_kv_heads = _heads(keys, n_layer, recurrent=state_bytes > 0)
    n_kv_heads, recurrent_layers = _layer_kinds(keys, n_kv_heads, recurrent=state_bytes > 0)
    sliding_window, sliding_layers = _sliding(architecture, keys, n_layer)
    return Geometry(
        architecture=architecture,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_heads=n_kv_heads,
        head_dim_k=_head_dim(keys, "attention.key_length", n_embd, n_head),
        head_dim_v=_head_dim(keys, "attention.value_length", n_embd, n_head),
        n_ff=_hidden_width(keys, n_layer),
        n_vocab=_vocabulary(keys, tensors, n_embd),
        trained_window=keys.integer("context_length", most=MAX_WINDOW),
        sliding_window=sliding_window,
        sliding_layers=sliding_layers,
        recurrent_bytes_per_sequence=state_bytes * recurrent_layers,
        weights_bytes_host=sum(aligned(tensor.bytes, HOST_ALIGNMENT_BYTES) for tensor in tensors.values()),
        weights_bytes_offloaded=_offloaded_bytes(tensors),
    )


def _heads(keys: _Keys, n_layer: int, *, recurrent: bool) -> tuple[int, tuple[int, ...]]:
    """(the most query heads, KV heads of each layer). Purely recurrent models have none."""
    heads = keys.per_layer("attention.head_count", n_layer, most=MAX_HEADS)
    kv_heads = keys.per_layer("attention.head_count_kv", n_layer, most=MAX_HEADS) if "attention.head_count_kv" in keys else heads
    for layer, (queries, kv) in enumerate(zip(heads, kv_heads, strict=True)):
        if kv and (queries < kv or queries % kv):
            raise Malformed(f"layer {layer}: {kv} KV heads do not divide {queries} heads")
    if not any(kv_heads) and not recurrent:
        raise Malformed(f"{keys.prefix}attention.head_count or head_count_kv is 0")
    return max(heads), kv_heads


def _head_dim(keys: _Keys, key: str, n_embd: int, n_head: int) -> int:
    if key in keys:
        return keys.integer(key, least=0 if n_head == 0 else 1, most=MAX_HEADS)
    if n_head and n_embd % n_head:
        raise Malformed(f"{n_head} heads do not divide the embedding length {n_embd}")
    return n_embd // n_head if n_head else 0


def _hidden_width(keys: _Keys, n_layer: int) -> int:
    """The widest hidden layer. Of experts, those that one token uses; of a recurrent block, its part of the work."""
    dense = max(keys.per_layer("feed_forward_length", n_layer, default=0))
    used = keys.integer("expert_used_count", default=0, least=0, most=MAX_HEADS)
    expert = keys.integer("expert_feed_forward_length", default=dense, least=0)
    shared = keys.integer("expert_shared_feed_forward_length", default=0, least=0)
    recurrent = keys.integer("ssm.inner_size", default=0, least=0) * 3 // 2  # fitted to mamba
    return max(dense, used * expert + shared, recurrent)


def _state_bytes(keys: _Keys, n_embd: int) -> int:
    """Of one recurrent layer and sequence (llama.cpp: n_embd_r + n_embd_s); 0 if the model has none."""
    if wkv := keys.integer("wkv.head_size", default=0, least=0):  # RWKV
        return F32_BYTES * n_embd * (wkv + keys.integer("token_shift_count", default=2))
    if kernel := keys.integer("shortconv.l_cache", default=0, least=0):  # LFM2
        return F32_BYTES * n_embd * (kernel - 1)
    inner, state, groups, kernel = (
        keys.integer(f"ssm.{key}", default=0, least=0) for key in ("inner_size", "state_size", "group_count", "conv_kernel")
    )
    return F32_BYTES * (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner)


def _layer_kinds(keys: _Keys, n_kv_heads: tuple[int, ...], *, recurrent: bool) -> tuple[tuple[int, ...], int]:
    """(KV heads of each layer, number of recurrent layers). A layer that is said to be neither may be both."""
    if not recurrent:
        return n_kv_heads, 0
    if period := keys.integer("full_attention_interval", default=0, least=0, most=MAX_LAYERS):
        n_kv_heads = tuple(0 if (layer + 1) % period else heads for layer, heads in enumerate(n_kv_heads))
    return n_kv_heads, n_kv_heads.count(0) or len(n_kv_heads)


def _sliding(architecture: str, keys: _Keys, n_layer: int) -> tuple[int, tuple[bool, ...]]:
    window = keys.integer("attention.sliding_window", default=0, least=0, most=MAX_WINDOW)
    pattern = keys.metadata.get(f"{keys.prefix}attention.sliding_window_pattern")
    if architecture not in SLIDING_PERIOD or window < 2 or isinstance(pattern, Array):
        return 0, (False,) * n_layer
    usual = SLIDING_PERIOD[architecture]
    period = keys.integer("attention.sliding_window_pattern", default=usual, least=2, most=MAX_LAYERS)  # llama.cpp aborts at 1
    return window, tuple((layer + 1) % period != 0 for layer in range(n_layer))


def _vocabulary(keys: _Keys, tensors: Mapping[str, Tensor], n_embd: int) -> int:
    """Tokens, which the list of tokens and the embedding table must agree about."""
    if TOKEN_EMBEDDINGS not in tensors:
        raise Malformed(f"the tensor {TOKEN_EMBEDDINGS} is missing: an adapter or a projector, not a model?")
    dims = tensors[TOKEN_EMBEDDINGS].dims
    if len(dims) != 2 or dims[0] != n_embd:
        raise Malformed(f"the embedding table has dimensions {dims}, not {n_embd} by the size of the vocabulary")
    for key in ("tokens", "scores", "token_type"):
        listed = keys.metadata.get(f"tokenizer.ggml.{key}")
        if listed is None:
            continue
        if not isinstance(listed, Array) or (listed.type_id == STRING) != (key == "tokens"):
            raise Malformed(f"tokenizer.ggml.{key} is not a list of {'strings' if key == 'tokens' else 'numbers'}")
        if listed.count != dims[1]:
            raise Malformed(f"tokenizer.ggml.{key} has {listed.count} entries, the embedding table {dims[1]}")
    if "tokenizer.ggml.tokens" not in keys.metadata:
        raise Malformed("the metadata key tokenizer.ggml.tokens is missing: the file has no vocabulary")
    return dims[1]


def _offloaded_bytes(tensors: Mapping[str, Tensor]) -> int:
    """On a GPU. The embedding table stays on the host; if it serves as output too, a copy of it is made."""
    tied = OUTPUT not in tensors
    return sum(_gpu_bytes(tensor) for name, tensor in tensors.items() if tied or name != TOKEN_EMBEDDINGS)


def _gpu_bytes(tensor: Tensor) -> int:
    total, excess = tensor.bytes, tensor.dims[0] % GPU_ROW_ELEMENTS
    if BLOCKS[tensor.type_id][0] > 1 and excess:
        total += row_bytes(tensor.type_id, GPU_ROW_ELEMENTS - excess)
    return aligned(total, GPU_ALIGNMENT_BYTES)
