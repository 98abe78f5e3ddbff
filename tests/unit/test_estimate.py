"""The memory formula by plain values. That they are llama.cpp's values is proved in tests/llama."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.core.estimate import Geometry, compute_bytes, context_bytes, kv_bytes
from conductor.types import ContextSpec, DeviceKind
from conductor.units import KIB, MIB

LLAMA_8B = Geometry(
    architecture="llama",
    n_layer=32,
    n_embd=4096,
    n_head=32,
    n_kv_heads=(8,) * 32,
    head_dim_k=128,
    head_dim_v=128,
    n_ff=14336,
    n_vocab=128256,
    trained_window=131072,
    sliding_window=0,
    sliding_layers=(False,) * 32,
    recurrent_bytes_per_sequence=0,
    weights_bytes_host=0,
    weights_bytes_offloaded=0,
)
SLIDING = dataclasses.replace(LLAMA_8B, architecture="gemma3", sliding_window=1024, sliding_layers=((True,) * 7 + (False,)) * 4)
MAMBA = dataclasses.replace(LLAMA_8B, architecture="mamba", n_head=0, n_kv_heads=(0,) * 32, recurrent_bytes_per_sequence=10 * MIB)

specs = st.builds(
    ContextSpec,
    window=st.integers(1, 200_000),
    n_batch=st.integers(1, 4096),
    n_ubatch=st.integers(1, 4096),
    kv_type=st.sampled_from(("f32", "f16", "q8_0", "q4_0")),
    flash_attention=st.booleans(),
)
geometries = st.sampled_from((LLAMA_8B, SLIDING, MAMBA))


def test_a_token_of_an_8b_model_takes_128_kib_of_kv() -> None:
    assert kv_bytes(LLAMA_8B, ContextSpec(window=4096)) == 4096 * 128 * KIB


def test_windows_are_rounded_up_to_256_tokens() -> None:
    assert kv_bytes(LLAMA_8B, ContextSpec(window=1)) == 256 * 128 * KIB
    assert kv_bytes(LLAMA_8B, ContextSpec(window=257)) == 512 * 128 * KIB


@pytest.mark.parametrize(("kv_type", "sixteenths"), [("f32", 32), ("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)])
def test_kv_types_take_their_bits(kv_type: str, sixteenths: float) -> None:
    assert kv_bytes(LLAMA_8B, ContextSpec(window=4096, kv_type=kv_type)) == 4096 * 128 * KIB * sixteenths / 16


def test_sliding_layers_keep_their_window_and_the_tokens_in_work() -> None:
    whole, sliding = 4 * 8192 * 4 * KIB, 28 * (1024 + 512) * 4 * KIB
    assert kv_bytes(SLIDING, ContextSpec(window=8192)) == whole + sliding


def test_a_recurrent_model_takes_the_same_for_any_window() -> None:
    short, long = ContextSpec(window=1024), ContextSpec(window=100_000)
    assert kv_bytes(MAMBA, long) == 0
    assert context_bytes(MAMBA, short) == context_bytes(MAMBA, long) > 10 * MIB


def test_flash_attention_saves_the_scores_of_all_heads() -> None:
    with_it, without = (compute_bytes(LLAMA_8B, ContextSpec(window=32768, flash_attention=on)) for on in (True, False))
    assert without - with_it > 512 * 32768 * 32 * 4 * 0.9


def test_a_quantised_cache_needs_an_f16_copy_of_a_layer_on_cuda_only() -> None:
    spec = ContextSpec(window=131072, kv_type="q8_0")
    cuda, host = (compute_bytes(LLAMA_8B, spec, device=device) for device in (DeviceKind.CUDA, DeviceKind.HOST))
    assert 512 * MIB > cuda - host > 256 * MIB


def test_the_compute_buffer_of_an_8b_model_is_close_to_the_measured_120_mib() -> None:
    assert 120 * MIB < compute_bytes(LLAMA_8B, ContextSpec(window=4096)) < 1.2 * 120 * MIB


def test_a_context_is_the_sum_of_its_parts() -> None:
    spec = ContextSpec(window=4096)
    assert context_bytes(LLAMA_8B, spec) == kv_bytes(LLAMA_8B, spec) + compute_bytes(LLAMA_8B, spec)


@given(geometries, specs, st.integers(1, 10_000))
def test_a_longer_window_never_takes_less(geometry: Geometry, spec: ContextSpec, more: int) -> None:
    longer = dataclasses.replace(spec, window=spec.window + more)
    assert kv_bytes(geometry, longer) >= kv_bytes(geometry, spec)
    assert context_bytes(geometry, longer) >= context_bytes(geometry, spec)


@given(geometries, specs)
def test_every_estimate_is_a_whole_positive_number_and_cuda_never_takes_less(geometry: Geometry, spec: ContextSpec) -> None:
    cuda, host = (context_bytes(geometry, spec, device=device) for device in (DeviceKind.CUDA, DeviceKind.HOST))
    assert isinstance(cuda, int)
    assert cuda >= host > 0
