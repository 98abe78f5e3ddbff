"""What a model file says about itself: a `Geometry` and a few names, in milliseconds, without loading it.

Refuses, with a sentence, whatever llama.cpp would refuse late, die of or misread. Does not know which architectures
llama.cpp supports, and does not read weights. Where a layer's kind is in doubt it counts what takes more memory.
See also: `gguf_file.py`, the container; `gguf_checks.py`, what no dry run finds; `core/estimate.py`, what follows from the
geometry.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO

from conductor.backend.gguf_checks import check_generates, check_norms, check_rotation, check_tensor_types, check_tokenizer
from conductor.backend.gguf_file import BLOCKS, STRING, Array, GgufFile, Malformed, Tensor, Value, aligned, parse, row_bytes
from conductor.backend.gguf_keys import Keys
from conductor.core.estimate import F32_BYTES, Geometry
from conductor.core.streaming import Blocks
from conductor.core.streaming import aligned as aligned_in_block
from conductor.errors import BadModelFile
from conductor.types import DeviceKind

MAX_LAYERS = 512  #: llama.cpp aborts above it
MAX_HEADS = 1 << 16
MAX_WINDOW = 1 << 31

#: Tensors begin at multiples of these in ggml's buffers, and CUDA reads quantised rows up to a multiple of the third.
HOST_ALIGNMENT_BYTES = 32
GPU_ALIGNMENT_BYTES = 128
GPU_ROW_ELEMENTS = 512

ARCHITECTURE = r"[a-z0-9][a-z0-9._-]{0,63}"
LAYER_TENSOR = r"^blk\.(\d+)\."
TOKEN_EMBEDDINGS, OUTPUT, LONG_FACTORS = "token_embd.weight", "output.weight", "rope_factors_long"

#: Architectures whose layers llama.cpp lets slide: all but every n-th. Others that could count as full, the larger.
SLIDING_PERIOD = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt-oss": 2}


@dataclass(frozen=True, slots=True)
class GgufHeader:
    architecture: str
    name: str | None
    geometry: Geometry
    #: what of its weights moves together, on the host device and on a GPU; None if its layers are not numbered from 0
    blocks: Mapping[DeviceKind, Blocks | None]
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
        file = FileIO(path, opener=_open)
    except IsADirectoryError:
        raise Malformed("is a directory") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: characters that no file name can have
        raise Malformed("no such file") from None
    with file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise Malformed("is not a regular file")
        if found.st_size == 0:
            raise Malformed("the file is empty")
        return parse(file)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would be waited for


def _describe(file: GgufFile) -> GgufHeader:
    keys = Keys(file.metadata)
    kind = keys.text("general.type", default="model")
    if kind != "model":
        raise Malformed(f"holds no language model but: {kind[:40]!r} (general.type)")
    if keys.integer("split.count", default=0, least=0) > 1:
        raise Malformed("is one part of a split model, which is not supported; join the parts with llama-gguf-split --merge")
    architecture = keys.text("general.architecture")
    if not re.fullmatch(ARCHITECTURE, architecture):  # it is part of what people are shown
        raise Malformed(f"general.architecture is no name: {architecture[:40]!r}")
    if not file.tensors:
        raise Malformed("has no tensors (a vocabulary without a model)")
    name = file.metadata.get("general.name")
    file_type = file.metadata.get("general.file_type")
    own = Keys(file.metadata, prefix=f"{architecture}.")
    check_generates(architecture, own)
    check_norms(own)
    geometry = _geometry(architecture, own, file.tensors)
    check_rotation(architecture, own, geometry.head_dim_k)
    check_tensor_types(file.tensors)
    check_tokenizer(file)
    return GgufHeader(
        architecture=architecture,
        name=name if isinstance(name, str) else None,
        geometry=geometry,
        blocks={kind: _blocks(file.tensors, kind) for kind in DeviceKind},
        has_chat_template=isinstance(file.metadata.get("tokenizer.chat_template"), str),
        file_type=file_type if isinstance(file_type, int) else None,
        metadata=file.metadata,
    )


def _geometry(architecture: str, keys: Keys, tensors: Mapping[str, Tensor]) -> Geometry:
    n_layer = keys.integer("block_count", most=MAX_LAYERS)
    n_embd = keys.integer("embedding_length")
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
        rotation_changes_at=_rotation_changes_at(keys, tensors),
    )


def _rotation_changes_at(keys: Keys, tensors: Mapping[str, Tensor]) -> int:
    """Models with two sets of rotation factors (Phi-3, MiniCPM) use the long one for contexts beyond what they began with."""
    if not any(LONG_FACTORS in name for name in tensors):
        return 0
    trained = keys.integer("context_length", most=MAX_WINDOW)
    return keys.integer("rope.scaling.original_context_length", default=trained, most=MAX_WINDOW)


def _heads(keys: Keys, n_layer: int, *, recurrent: bool) -> tuple[int, tuple[int, ...]]:
    """(the most query heads, KV heads of each layer). Purely recurrent models have none."""
    heads = keys.per_layer("attention.head_count", n_layer, most=MAX_HEADS)
    kv_heads = keys.per_layer("attention.head_count_kv", n_layer, most=MAX_HEADS) if "attention.head_count_kv" in keys else heads
    for layer, (queries, kv) in enumerate(zip(heads, kv_heads, strict=True)):
        if kv and (queries < kv or queries % kv):
            raise Malformed(f"layer {layer}: {kv} KV heads do not divide {queries} heads")
    if not any(kv_heads) and not recurrent:
        raise Malformed(f"{keys.prefix}attention.head_count or head_count_kv is 0")
    return max(heads), kv_heads


def _head_dim(keys: Keys, key: str, n_embd: int, n_head: int) -> int:
    if key in keys:
        return keys.integer(key, least=0 if n_head == 0 else 1, most=MAX_HEADS)
    if n_head and n_embd % n_head:
        raise Malformed(f"{n_head} heads do not divide the embedding length {n_embd}")
    return n_embd // n_head if n_head else 0


def _hidden_width(keys: Keys, n_layer: int) -> int:
    """The widest hidden layer. Of experts, those that one token uses; of a recurrent block, its part of the work."""
    dense = max(keys.per_layer("feed_forward_length", n_layer, default=0))
    used = max(keys.per_layer("expert_used_count", n_layer, default=0, most=MAX_HEADS))
    expert = max(keys.per_layer("expert_feed_forward_length", n_layer, default=dense))
    shared = keys.integer("expert_shared_feed_forward_length", default=0, least=0)
    recurrent = keys.integer("ssm.inner_size", default=0, least=0) * 3 // 2  # fitted to mamba
    return max(dense, used * expert + shared, recurrent)


def _state_bytes(keys: Keys, n_embd: int) -> int:
    """Of one recurrent layer and sequence (llama.cpp: n_embd_r + n_embd_s); 0 if the model has none."""
    if wkv := keys.integer("wkv.head_size", default=0, least=0):  # RWKV
        return F32_BYTES * n_embd * (wkv + keys.integer("token_shift_count", default=2))
    if kernel := keys.integer("shortconv.l_cache", default=0, least=0):  # LFM2
        return F32_BYTES * n_embd * (kernel - 1)
    inner, state, groups, kernel = (
        keys.integer(f"ssm.{key}", default=0, least=0) for key in ("inner_size", "state_size", "group_count", "conv_kernel")
    )
    return F32_BYTES * (max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner)


def _layer_kinds(keys: Keys, n_kv_heads: tuple[int, ...], *, recurrent: bool) -> tuple[tuple[int, ...], int]:
    """(KV heads of each layer, number of recurrent layers). A layer that is said to be neither may be both."""
    if not recurrent:
        return n_kv_heads, 0
    if period := keys.integer("full_attention_interval", default=0, least=0, most=MAX_LAYERS):
        n_kv_heads = tuple(0 if (layer + 1) % period else heads for layer, heads in enumerate(n_kv_heads))
    return n_kv_heads, n_kv_heads.count(0) or len(n_kv_heads)


def _sliding(architecture: str, keys: Keys, n_layer: int) -> tuple[int, tuple[bool, ...]]:
    window = keys.integer("attention.sliding_window", default=0, least=0, most=MAX_WINDOW)
    pattern = keys.metadata.get(f"{keys.prefix}attention.sliding_window_pattern")
    if architecture not in SLIDING_PERIOD or window < 2 or isinstance(pattern, Array):
        return 0, (False,) * n_layer
    usual = SLIDING_PERIOD[architecture]
    period = keys.integer("attention.sliding_window_pattern", default=usual, least=2, most=MAX_LAYERS)  # llama.cpp aborts at 1
    return window, tuple((layer + 1) % period != 0 for layer in range(n_layer))


def _vocabulary(keys: Keys, tensors: Mapping[str, Tensor], n_embd: int) -> int:
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


def _blocks(tensors: Mapping[str, Tensor], kind: DeviceKind) -> Blocks | None:
    """As `MovableWeights` lays them out. On a GPU the embeddings stay at home, but for a copy where they serve as output."""
    on_gpu = kind is DeviceKind.CUDA
    layers: dict[int, int] = {}
    head = stays = 0
    for name, tensor in tensors.items():
        size = aligned_in_block(_gpu_bytes(tensor) if on_gpu else tensor.bytes)
        if of_layer := re.match(LAYER_TENSOR, name):
            layers[int(of_layer[1])] = layers.get(int(of_layer[1]), 0) + size
        elif on_gpu and name == TOKEN_EMBEDDINGS:
            stays += size
            head += 0 if OUTPUT in tensors else size
        else:
            head += size
    if sorted(layers) != list(range(len(layers))) or not layers:
        return None
    return Blocks(head, tuple(layers[number] for number in range(len(layers))), stays)


def _gpu_bytes(tensor: Tensor) -> int:
    total, excess = tensor.bytes, tensor.dims[0] % GPU_ROW_ELEMENTS
    if BLOCKS[tensor.type_id][0] > 1 and excess:
        total += row_bytes(tensor.type_id, GPU_ROW_ELEMENTS - excess)
    return aligned(total, GPU_ALIGNMENT_BYTES)
