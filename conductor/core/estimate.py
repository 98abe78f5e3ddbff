"""What a context will take, in bytes, from a model's geometry: before anything is loaded, in microseconds.

The KV cache and the recurrent state are exact. The compute buffers are estimated on the safe side: llama.cpp's allocator
packs the tensors of its graph, and which of them live at once is approximated by the widest moment of three (attention,
feed-forward, output). Covers contexts as the conductor makes them: one sequence (`n_seq_max=1`), one output row
(`n_outputs_max=1`), `swa_full=False`, the whole model on one device.

Does not cover what a process takes once (CUDA context, libraries) or CUDA's pool of temporary buffers, some MiB a context.
See also: `backend/gguf_header.py` reads a `Geometry`; `tests/llama/test_estimate_against_llama.py` holds it against llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from conductor.types import ContextSpec, DeviceKind, ModelId, ModelKey, Record

#: On the compute estimate. Measured with llama-cpp-python 0.3.36 on the CPU (dry runs, windows of 512 to 131,072, all KV
#: types, flash attention on and off): without a margin the estimate is 1.0005 to 1.37 of the real figure in 1,370 contexts
#: of llama and qwen2 geometries (n_ff 2 to 8 times n_embd), at worst 0.987 in odd ones (n_ff 24 times n_embd).
MARGIN = 1.04
#: For all other architectures. The same measurement gives 1.0005 to 1.37 for gemma3 and 1.08 to 1.11 for mamba, which says
#: nothing about the rest.
MARGIN_OTHER = 1.2
FITTED_ARCHITECTURES = frozenset({"llama", "qwen2"})

#: Input tensors, and the small ones that no term counts.
SLACK_BYTES = 64 << 10

#: llama.cpp rounds the number of cells of a cache up to a multiple of this.
CELL_MULTIPLE = 256

F32_BYTES = 4
F16_BYTES = 2
INDEX_BYTES = 8

#: elements in a block and bytes of a block, by KV type
KV_BLOCKS: dict[str, tuple[int, int]] = {"f32": (1, 4), "f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}


@dataclass(frozen=True, slots=True)
class Geometry:
    """What of a model decides its memory."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_heads: tuple[int, ...]  #: of each layer; 0 where a layer keeps no KV
    head_dim_k: int
    head_dim_v: int
    n_ff: int  #: the widest hidden layer that a token passes through, all experts used at once counted
    n_vocab: int
    trained_window: int
    sliding_window: int  #: 0 is none
    sliding_layers: tuple[bool, ...]
    recurrent_bytes_per_sequence: int  #: over all recurrent layers
    weights_bytes_host: int  #: all tensors, each rounded up as ggml's buffers do
    weights_bytes_offloaded: int  #: on a GPU: without the token embeddings, or with them as output when the two are tied

    @property
    def kv_width(self) -> int:
        """Elements of K and V that one token adds to the widest layer."""
        return max(self.n_kv_heads, default=0) * (self.head_dim_k + self.head_dim_v)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model file as its header describes it."""

    id: ModelId
    key: ModelKey
    path: str
    device: DeviceKind  #: what the bytes are counted for
    weights_bytes: int
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Footprint(Record):
    """What a model and one context of it take on the device."""

    weights_bytes: int
    kv_bytes: int  #: recurrent state included
    compute_bytes: int

    @property
    def context_bytes(self) -> int:
        return self.kv_bytes + self.compute_bytes


def context_bytes(geometry: Geometry, spec: ContextSpec, *, device: DeviceKind = DeviceKind.CUDA) -> int:
    """Bytes of a live context: KV cache, recurrent state and compute buffers."""
    return kv_bytes(geometry, spec) + geometry.recurrent_bytes_per_sequence + compute_bytes(geometry, spec, device=device)


def kv_bytes(geometry: Geometry, spec: ContextSpec) -> int:
    """Bytes of the KV cache; exact. The whole window is allocated, used or not."""
    return sum(
        _cells(geometry, spec, sliding=sliding)
        * (_row_bytes(heads * geometry.head_dim_k, spec.kv_type) + _row_bytes(heads * geometry.head_dim_v, spec.kv_type))
        for heads, sliding in zip(geometry.n_kv_heads, geometry.sliding_layers, strict=True)
    )


def compute_bytes(geometry: Geometry, spec: ContextSpec, *, device: DeviceKind = DeviceKind.CUDA) -> int:
    """Bytes of the compute buffers, not below the real figure; on the host less than on CUDA for a quantised cache."""
    caches = _cache_sizes(geometry, spec)
    widest = max(
        _feed_forward_bytes(geometry, spec),
        _output_bytes(geometry),
        *(_attention_bytes(geometry, spec, cells=cells, device=device) for cells in caches),
    )
    total = (
        widest + _input_bytes(geometry, spec, caches) + len(caches) * _rotation_bytes(geometry, spec) + _recurrent_bytes(geometry)
    )
    margin = MARGIN if geometry.architecture in FITTED_ARCHITECTURES else MARGIN_OTHER
    return int(total * margin) + SLACK_BYTES


def _pad(count: int) -> int:
    return -(-count // CELL_MULTIPLE) * CELL_MULTIPLE


def _row_bytes(elements: int, kv_type: str) -> int:
    block, block_bytes = KV_BLOCKS[kv_type]
    return elements * block_bytes // block


def _cells(geometry: Geometry, spec: ContextSpec, *, sliding: bool) -> int:
    """Tokens that a layer's cache has room for. A sliding layer forgets all but its window and the tokens in work."""
    whole = _pad(spec.window)
    return min(whole, _pad(geometry.sliding_window + _tokens(spec))) if sliding else whole


def _cache_sizes(geometry: Geometry, spec: ContextSpec) -> list[int]:
    """Cells of each cache: llama.cpp keeps one for the full layers and one for the sliding ones, each with its mask."""
    kinds = {sliding for heads, sliding in zip(geometry.n_kv_heads, geometry.sliding_layers, strict=True) if heads}
    return [_cells(geometry, spec, sliding=sliding) for sliding in kinds]


def _tokens(spec: ContextSpec) -> int:
    """Tokens in work at once: llama.cpp limits a batch to the window."""
    return min(spec.window, spec.n_batch, spec.n_ubatch)


def _feed_forward_bytes(geometry: Geometry, spec: ContextSpec) -> int:
    return _tokens(spec) * F32_BYTES * (3 * geometry.n_ff + 5 * geometry.n_embd)


def _output_bytes(geometry: Geometry) -> int:
    """One row of logits."""
    return F32_BYTES * (geometry.n_vocab + 5 * geometry.n_embd)


def _attention_bytes(geometry: Geometry, spec: ContextSpec, *, cells: int, device: DeviceKind) -> int:
    queries = geometry.n_head * max(geometry.head_dim_k, geometry.head_dim_v)
    total = _tokens(spec) * F32_BYTES * (4 * geometry.n_embd + 2 * queries + geometry.kv_width // 2)
    if not spec.flash_attention:
        return total + _tokens(spec) * cells * geometry.n_head * F32_BYTES  # the scores of all heads
    if spec.kv_type == "f32" or (spec.kv_type != "f16" and device is DeviceKind.CUDA):
        total += cells * geometry.kv_width * F16_BYTES  # flash attention reads f16: a copy of one layer's cache
    return total


def _input_bytes(geometry: Geometry, spec: ContextSpec, caches: list[int]) -> int:
    """For each cache a mask; without flash attention V is stored transposed, which takes an index for each element too."""
    if spec.flash_attention:
        return _tokens(spec) * sum(caches) * F16_BYTES
    v_width = max(geometry.n_kv_heads, default=0) * geometry.head_dim_v
    return _tokens(spec) * (sum(caches) * F32_BYTES + len(caches) * v_width * INDEX_BYTES)


def _rotation_bytes(geometry: Geometry, spec: ContextSpec) -> int:
    """A quantised cache holds rotated heads, which keeps its error small; the rotation is a matrix among the inputs."""
    quantised = KV_BLOCKS[spec.kv_type][0] > 1
    return sum(F32_BYTES * dim * dim for dim in {geometry.head_dim_k, geometry.head_dim_v}) if quantised else 0


def _recurrent_bytes(geometry: Geometry) -> int:
    """The state of one layer, read and written."""
    recurrent_layers = sum(not heads for heads in geometry.n_kv_heads) or geometry.n_layer
    return 2 * geometry.recurrent_bytes_per_sequence // recurrent_layers
