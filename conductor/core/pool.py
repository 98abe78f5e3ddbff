"""What CUDA takes for a model and a context beside the bytes that llama.cpp accounts for.

Two things. The driver hands out memory in granules, so each buffer ends in a part of one that nobody else can use. And
each context has a pool of temporary buffers for its matrix products and its attention, which grows with the first
batches, is a stack, and never shrinks: so its size is that of the largest operation. Running out of it aborts the
process, so it is priced for any batch that may come, not for the last one.

The law is read from llama.cpp's ggml-cuda (mmq.cu, mmq.cuh, fattn-common.cuh and `ggml_cuda_pool_vmm`) as of
llama-cpp-python 0.3.36, for Turing and later; `benchmarks/estimate.py` holds it against the driver. Covers quantised weights.
Does not cover f16, bf16 and f32 weights, whose products go through cuBLAS, nor mixtures of experts.
"""

from __future__ import annotations

from dataclasses import replace

from conductor.core.estimate import F16_BYTES, F32_BYTES, Footprint, Geometry, slot_cells, step_tokens
from conductor.types import ContextSpec
from conductor.units import MIB

#: What the driver hands out at once: cudaMalloc rounds up to it, and the pool grows by it.
GRANULE_BYTES = 2 * MIB
#: More than any card has so far (RTX PRO 6000: 188), for one that does not tell.
MOST_MULTIPROCESSORS = 192

#: Rows of activations are padded to this many elements before they are quantised.
ROW_ELEMENTS = 512
#: A product's activations as q8_1: blocks of 128 elements, a byte each, with 16 bytes of scales.
Q8_BLOCK, Q8_BLOCK_BYTES = 128, 144
#: Products are cut into tiles. Where these do not fill the card, each multiprocessor has a tile of partial sums.
TILE_ROWS = TILE_COLUMNS = 128
#: Flash attention: queries in work at once in a block, and blocks at once on a multiprocessor (128 threads and more than
#: 128 registers each leave no room for another).
ATTENTION_COLUMNS, ATTENTION_BLOCKS = 64, 4
#: What cuBLAS is given to work in on Hopper and later, and before. Only products without flash attention use it here.
CUBLAS_BYTES = 32 * MIB


def granules(size: int) -> int:
    """`size` bytes as the driver hands them out."""
    return -(-size // GRANULE_BYTES) * GRANULE_BYTES


def pool_bytes(geometry: Geometry, spec: ContextSpec, *, multiprocessors: int = MOST_MULTIPROCESSORS) -> int:
    """The most that a context's pool of temporary buffers grows to. On a GPU only: the host device has no such pool."""
    largest = max(_product_bytes(geometry, spec, multiprocessors), _attention_bytes(geometry, spec, multiprocessors))
    return granules(largest) + (0 if spec.flash_attention else CUBLAS_BYTES)


def on_gpu(footprint: Footprint, geometry: Geometry) -> Footprint:
    """What llama.cpp accounts for, as the driver hands it out: each of its buffers in granules. Without the pool."""
    return replace(
        footprint,
        weights_bytes=granules(footprint.weights_bytes),
        kv_bytes=granules(footprint.kv_bytes) + (_caches(geometry) - 1) * GRANULE_BYTES,
        compute_bytes=granules(footprint.compute_bytes),
    )


def _caches(geometry: Geometry) -> int:
    """Buffers that a context keeps its past in: one for the full layers, one for the sliding ones, one for recurrent state."""
    kinds = {sliding for heads, sliding in zip(geometry.n_kv_heads, geometry.sliding_layers, strict=True) if heads}
    return max(1, len(kinds) + (geometry.recurrent_bytes_per_sequence > 0))


def _product_bytes(geometry: Geometry, spec: ContextSpec, multiprocessors: int) -> int:
    """Activations times quantised weights: the activations as q8_1, and the partial sums."""
    widest = max(geometry.n_embd, geometry.n_ff, geometry.n_head * max(geometry.head_dim_k, geometry.head_dim_v))
    row = -(-widest // ROW_ELEMENTS) * ROW_ELEMENTS
    activations = (step_tokens(spec) * row // Q8_BLOCK + TILE_COLUMNS) * Q8_BLOCK_BYTES
    return activations + multiprocessors * TILE_ROWS * TILE_COLUMNS * F32_BYTES


def _attention_bytes(geometry: Geometry, spec: ContextSpec, multiprocessors: int) -> int:
    """Flash attention: what its blocks have to combine. Without it: all heads' scores and values as f16, or the keys as f32."""
    if spec.flash_attention:
        pairs = 2 + geometry.head_dim_v // 2  # of f32: twice maximum and sum, and the values
        return multiprocessors * ATTENTION_BLOCKS * ATTENTION_COLUMNS * pairs * 2 * F32_BYTES
    cells = spec.slots * slot_cells(spec)
    scores = step_tokens(spec) * geometry.n_head * (slot_cells(spec) + geometry.head_dim_v) * F16_BYTES
    return max(scores, cells * max(geometry.n_kv_heads, default=0) * geometry.head_dim_k * F32_BYTES)
