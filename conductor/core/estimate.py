"""What a context will take, in bytes, from a model's geometry: before anything is loaded, in microseconds.

The KV cache and the recurrent state are exact. The compute buffers are estimated on the safe side: llama.cpp's allocator
packs the tensors of its graph, and which of them live at once is approximated by the widest moment of three (attention,
feed-forward, output). Covers contexts as the conductor makes them: each of `slots` sequences with a cache and one output
row of its own (`kv_unified=False`, `n_outputs_max=n_seq_max`), `swa_full=False`, the whole model on one device.

Does not cover what a process takes once (CUDA context, libraries) or CUDA's pool of temporary buffers, some MiB a context.
See also: `backend/gguf_header.py` reads a `Geometry`; `tests/llama/test_estimate_against_llama.py` holds it against llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from conductor.core.streaming import Blocks
from conductor.types import ContextSpec, DeviceKind, ModelId, ModelKey, Record

#: On the compute estimate. Measured with llama-cpp-python 0.3.36 on the CPU: dry runs of random geometries (n_ff 2 to 8 times
#: n_embd), windows of 1 to 131,072 tokens, 1 to 8 slots, batches of 1 to 2,048, all KV types, flash attention on and off. With
#: its margin the estimate is 1.04 to 1.6 times the real figure in 7,200 contexts of llama and qwen2 geometries; with up to 64
#: slots 1.00 to 2.0; on an H200 1.04 to 2.8 in 140. Above 8 MiB, that is: small buffers are off by more, up to a few MiB.
MARGIN = 1.04
#: For all other architectures. The same measurement gives 1.00 to 1.9 for gemma3, the least with heads several times as wide
#: as the embedding, and 1.18 to 1.9 for mamba, which says nothing about the rest; on an H200 1.2 to 1.9.
MARGIN_OTHER = 1.2
FITTED_ARCHITECTURES = frozenset({"llama", "qwen2"})

#: Input tensors, and the small ones that no term counts.
SLACK_BYTES = 64 << 10

#: llama.cpp rounds the number of cells of a cache up to a multiple of this.
CELL_MULTIPLE = 256

MAX_SLOTS = 256  #: llama.cpp's LLAMA_MAX_SEQ
MAX_CONTEXT_TOKENS = 2**32 - CELL_MULTIPLE  #: of all slots together; llama.cpp counts them in 32 bits
MAX_BATCH_TOKENS = 1 << 20  #: llama.cpp takes 2^31, and minutes and gigabytes for its lists of them

LEAST_TOKENS_EACH = 3  #: in a step, of each of several slots

GROWTH = 1.5  #: from one window of a ladder to the next

#: Tensors begin at multiples of these bytes in CUDA's buffers, and it reads quantised rows up to a multiple of this.
GPU_ALIGNMENT_BYTES = 128
GPU_ROW_ELEMENTS = 512

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
    #: longrope: llama.cpp turns positions by other factors in contexts of more tokens than this; 0: there is one set only
    rotation_changes_at: int = 0

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
    #: what of its weights moves together; None if they cannot move
    blocks: Blocks | None = None


@dataclass(frozen=True, slots=True)
class Footprint(Record):
    """What a model and one context of it take on the device, and in host memory beside it.

    The host's part is for information. It is 0 on the host device, where all memory is the device's, and None where only
    the formula tells.
    """

    weights_bytes: int
    kv_bytes: int  #: recurrent state included
    compute_bytes: int
    host_weights_bytes: int | None = 0  #: beside a GPU: the token embeddings
    host_context_bytes: int | None = 0  #: beside a GPU: what a step's inputs are prepared in

    @property
    def context_bytes(self) -> int:
        return self.kv_bytes + self.compute_bytes

    @property
    def host_bytes(self) -> int | None:
        if self.host_weights_bytes is None or self.host_context_bytes is None:
            return None
        return self.host_weights_bytes + self.host_context_bytes


def first_rung(geometry: Geometry, first: int, full: int) -> int:
    """What a context of `full` tokens may begin with: `first`, unless its KV would be no use to the larger context."""
    return max(first, geometry.rotation_changes_at + 1) if full > geometry.rotation_changes_at > 0 else first


def windows_ladder(first: int, full: int) -> tuple[int, ...]:
    """The windows that a context grows through, from `first` to `full` tokens, in llama.cpp's steps of 256.

    By half each time: a session overshoots its need by at most half, on average by a quarter, and ten rebuilds lead from
    4,096 tokens to 172,032.
    """
    if first < 1:
        raise ValueError(f"a ladder cannot begin with {first} tokens")
    windows, window = [], _pad(first)
    while window < full:
        windows.append(window)
        window = _pad(int(window * GROWTH))
    return (*windows, full)


def slot_steps(most: int) -> tuple[int, ...]:
    """The numbers of slots that a pool may have, up to `most`: by doubling, so that few shapes have to be known."""
    return (*(step for step in (1 << n for n in range(most.bit_length())) if step < most), most)


def refusal(spec: ContextSpec) -> str | None:
    """Why llama.cpp must not see these parameters: it would abort, or take another number for them. None if it may."""
    if spec.kv_type not in KV_BLOCKS:
        return f"the KV type {spec.kv_type!r} is none of {', '.join(KV_BLOCKS)}"
    if not 1 <= spec.slots <= MAX_SLOTS:
        return f"{spec.slots} slots; a context has 1 to {MAX_SLOTS}"
    if min(spec.window, spec.n_batch, spec.n_ubatch) < 1:
        return f"a window of {spec.window} tokens in batches of {spec.n_batch} and {spec.n_ubatch}; each must be at least 1"
    if batch_tokens(spec) > MAX_BATCH_TOKENS:
        return f"batches of {spec.n_batch} tokens; {MAX_BATCH_TOKENS} is the most"
    if spec.slots * slot_cells(spec) > MAX_CONTEXT_TOKENS:
        return f"{spec.slots} slots of {spec.window} tokens; llama.cpp counts to {MAX_CONTEXT_TOKENS} in one context"
    return None


def predicted(plan: ModelPlan, spec: ContextSpec) -> Footprint:
    """By the formula: weights and KV exact, compute on the safe side."""
    host = 0 if plan.device is DeviceKind.HOST else None
    compute = compute_bytes(plan.geometry, spec, device=plan.device)
    return Footprint(plan.weights_bytes, cache_bytes(plan.geometry, spec, device=plan.device), compute, host, host)


def context_bytes(geometry: Geometry, spec: ContextSpec, *, device: DeviceKind = DeviceKind.CUDA) -> int:
    """Bytes of a live context: KV cache, recurrent state and compute buffers."""
    return cache_bytes(geometry, spec, device=device) + compute_bytes(geometry, spec, device=device)


def cache_bytes(geometry: Geometry, spec: ContextSpec, *, device: DeviceKind = DeviceKind.CUDA) -> int:
    """Bytes of the KV cache and the recurrent state; exact."""
    return kv_bytes(geometry, spec, device=device) + spec.slots * geometry.recurrent_bytes_per_sequence


def kv_bytes(geometry: Geometry, spec: ContextSpec, *, device: DeviceKind = DeviceKind.CUDA) -> int:
    """Bytes of the KV cache; exact. Every slot's whole window is allocated, used or not."""
    return sum(
        _tensor_bytes(spec, heads * dim, cells=spec.slots * _cells(geometry, spec, sliding=sliding), device=device)
        for heads, sliding in zip(geometry.n_kv_heads, geometry.sliding_layers, strict=True)
        for dim in (geometry.head_dim_k, geometry.head_dim_v)
    )


def compute_bytes(geometry: Geometry, spec: ContextSpec, *, device: DeviceKind = DeviceKind.CUDA) -> int:
    """Bytes of the compute buffers, not below the real figure; on the host less than on CUDA for a quantised cache."""
    caches = _cache_sizes(geometry, spec)
    widest = max(
        _feed_forward_bytes(geometry, spec),
        _output_bytes(geometry, spec),
        *(_attention_bytes(geometry, spec, cells=cells, device=device) for cells in caches),
    )
    total = widest + _input_bytes(geometry, spec, caches) + len(caches) * _rotation_bytes(geometry, spec)
    margin = MARGIN if geometry.architecture in FITTED_ARCHITECTURES else MARGIN_OTHER
    return int(total * margin) + SLACK_BYTES


def slot_cells(spec: ContextSpec) -> int:
    """Tokens that one slot has room for, as llama.cpp rounds them (`n_ctx_seq`)."""
    return _pad(spec.window)


def batch_tokens(spec: ContextSpec) -> int:
    """The most tokens of one decode (`n_batch`): what is asked for, within the windows, but enough for all slots."""
    return max(_least_tokens(spec), min(spec.n_batch, spec.window * spec.slots))


def step_tokens(spec: ContextSpec) -> int:
    """The most tokens in work at once (`n_ubatch`): what is asked for, within the batch, but enough for all slots."""
    return max(_least_tokens(spec), min(spec.n_ubatch, batch_tokens(spec)))


def _least_tokens(spec: ContextSpec) -> int:
    """llama.cpp lays a step out with as many tokens of each slot. With few, a step for one slot alone could take more than that:
    from three on, CUDA's attention reads a quantised cache as f16.
    """
    return LEAST_TOKENS_EACH * spec.slots if spec.slots > 1 else 1


def _pad(count: int) -> int:
    return -(-count // CELL_MULTIPLE) * CELL_MULTIPLE


def _quantised(spec: ContextSpec) -> bool:
    return KV_BLOCKS[spec.kv_type][0] > 1


def _tensor_bytes(spec: ContextSpec, elements: int, *, cells: int, device: DeviceKind) -> int:
    """A layer's K or V, with so many `elements` a cell. CUDA pads the last row of quantised tensors."""
    block, block_bytes = KV_BLOCKS[spec.kv_type]
    pad = -elements % GPU_ROW_ELEMENTS if device is DeviceKind.CUDA and _quantised(spec) else 0
    size = cells * (elements * block_bytes // block) + pad * block_bytes // block
    return size + (-size % GPU_ALIGNMENT_BYTES if pad else 0)


def _cells(geometry: Geometry, spec: ContextSpec, *, sliding: bool) -> int:
    """Tokens that a layer's cache has room for. A sliding layer forgets all but its window and the tokens in work."""
    whole = slot_cells(spec)
    return min(whole, _pad(geometry.sliding_window + step_tokens(spec))) if sliding else whole


def _cache_sizes(geometry: Geometry, spec: ContextSpec) -> list[int]:
    """Cells of each cache: llama.cpp keeps one for the full layers and one for the sliding ones, each with its mask."""
    kinds = {sliding for heads, sliding in zip(geometry.n_kv_heads, geometry.sliding_layers, strict=True) if heads}
    return [_cells(geometry, spec, sliding=sliding) for sliding in kinds]


def _tokens(spec: ContextSpec) -> int:
    """Tokens that the buffers are laid out for: as many of each slot."""
    return -(-step_tokens(spec) // spec.slots) * spec.slots


def _feed_forward_bytes(geometry: Geometry, spec: ContextSpec) -> int:
    """Of a recurrent layer, the state of each slot included: read and written."""
    recurrent_layers = sum(not heads for heads in geometry.n_kv_heads) or geometry.n_layer
    state = geometry.recurrent_bytes_per_sequence // recurrent_layers
    return _tokens(spec) * F32_BYTES * (3 * geometry.n_ff + 5 * geometry.n_embd) + spec.slots * 2 * state


def _output_bytes(geometry: Geometry, spec: ContextSpec) -> int:
    """One row of logits for each slot, beside the last layer's input."""
    return F32_BYTES * (spec.slots * (geometry.n_vocab + 5 * geometry.n_embd) + _tokens(spec) * geometry.n_embd)


def _attention_bytes(geometry: Geometry, spec: ContextSpec, *, cells: int, device: DeviceKind) -> int:
    queries = geometry.n_head * max(geometry.head_dim_k, geometry.head_dim_v)
    heads = 2 * queries + geometry.kv_width
    if _quantised(spec):  # and rotated
        heads += queries
    total = _tokens(spec) * F32_BYTES * (4 * geometry.n_embd + heads)
    if not spec.flash_attention:
        return total + _tokens(spec) * cells * geometry.n_head * F32_BYTES  # the scores of all heads
    if spec.kv_type == "f32" or (spec.kv_type != "f16" and device is DeviceKind.CUDA):
        total += spec.slots * cells * geometry.kv_width * F16_BYTES  # flash attention reads f16: a copy of one layer's cache
    return total


def _input_bytes(geometry: Geometry, spec: ContextSpec, caches: list[int]) -> int:
    """For each cache a mask; without flash attention V is stored transposed, which takes an index for each element too."""
    if spec.flash_attention:
        return _tokens(spec) * sum(caches) * F16_BYTES
    v_width = max(geometry.n_kv_heads, default=0) * geometry.head_dim_v
    return _tokens(spec) * (sum(caches) * F32_BYTES + len(caches) * v_width * INDEX_BYTES)


def _rotation_bytes(geometry: Geometry, spec: ContextSpec) -> int:
    """A quantised cache holds rotated heads, which keeps its error small; the rotation is a matrix among the inputs."""
    if not _quantised(spec):
        return 0
    return sum(F32_BYTES * dim * dim for dim in {geometry.head_dim_k, geometry.head_dim_v})
