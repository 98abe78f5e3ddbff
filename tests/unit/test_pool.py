"""The pool's law, against figures worked out by hand for cards and models whose names are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conductor.core.estimate import Footprint, Geometry
from conductor.core.pool import GRANULE_BYTES, granules, on_gpu, pool_bytes
from conductor.types import ContextSpec
from conductor.units import MIB

H200 = 132


def geometry(n_embd: int, n_ff: int, n_head: int, head_dim: int) -> Geometry:
    return Geometry(
        architecture="llama", n_layer=2, n_embd=n_embd, n_head=n_head, n_kv_heads=(2, 2), head_dim_k=head_dim,
        head_dim_v=head_dim, n_ff=n_ff, n_vocab=1000, trained_window=8192, sliding_window=0, sliding_layers=(False, False),
        recurrent_bytes_per_sequence=0, weights_bytes_host=0, weights_bytes_offloaded=0,
    )  # fmt: skip


SMOLLM2_360M = geometry(960, 2560, 15, 64)
QWEN2_500M = geometry(896, 4864, 14, 64)
LLAMA_1B = geometry(2048, 8192, 32, 64)
LLAMA_8B = geometry(4096, 14336, 32, 128)


@pytest.mark.parametrize("size", [0, 1, GRANULE_BYTES - 1, GRANULE_BYTES, GRANULE_BYTES + 1])
def test_memory_is_handed_out_in_granules(size: int) -> None:
    assert granules(size) % GRANULE_BYTES == 0
    assert 0 <= granules(size) - size < GRANULE_BYTES


@pytest.mark.parametrize(("model", "pool"), [(SMOLLM2_360M, 10), (QWEN2_500M, 12), (LLAMA_1B, 14), (LLAMA_8B, 18)])
def test_the_pool_holds_the_widest_activations_and_a_tile_for_each_multiprocessor(model: Geometry, pool: int) -> None:
    assert pool_bytes(model, ContextSpec(4096), multiprocessors=H200) == pool * MIB


def test_the_window_does_not_matter_and_the_batch_does() -> None:
    small, large = ContextSpec(4096), ContextSpec(172_032)
    assert pool_bytes(LLAMA_8B, small) == pool_bytes(LLAMA_8B, large)
    wide = replace(large, n_batch=2048, n_ubatch=2048)
    assert pool_bytes(LLAMA_8B, wide, multiprocessors=H200) == 40 * MIB


def test_a_card_that_does_not_tell_its_multiprocessors_is_taken_for_the_largest() -> None:
    assert pool_bytes(LLAMA_1B, ContextSpec(4096)) > pool_bytes(LLAMA_1B, ContextSpec(4096), multiprocessors=H200)


def test_without_flash_attention_the_scores_are_copied() -> None:
    spec = ContextSpec(8192, flash_attention=False)
    assert pool_bytes(LLAMA_1B, spec, multiprocessors=H200) > 512 * 8192 * 32 * 2


def test_each_buffer_is_rounded_up_alone() -> None:
    footprint = Footprint(weights_bytes=3 * MIB, kv_bytes=4 * MIB, compute_bytes=1)
    assert on_gpu(footprint, LLAMA_1B) == Footprint(4 * MIB, 4 * MIB, 2 * MIB)


def test_caches_of_two_kinds_are_two_buffers() -> None:
    sliding = replace(LLAMA_1B, sliding_window=1024, sliding_layers=(True, False))
    footprint = Footprint(weights_bytes=0, kv_bytes=4 * MIB, compute_bytes=0)
    assert on_gpu(footprint, sliding).kv_bytes == 6 * MIB
