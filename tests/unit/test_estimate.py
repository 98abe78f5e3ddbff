"""The memory formula by plain values. That they are llama.cpp's values is proved in tests/llama."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.core.estimate import (
    MAX_BATCH_TOKENS,
    MAX_CONTEXT_TOKENS,
    MAX_SLOTS,
    Geometry,
    ModelPlan,
    batch_tokens,
    cache_bytes,
    compute_bytes,
    context_bytes,
    first_rung,
    kv_bytes,
    predicted,
    refusal,
    slot_cells,
    step_tokens,
    windows_ladder,
)
from conductor.types import ContextSpec, DeviceKind, ModelId, ModelKey
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
    slots=st.integers(1, 8),
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


def test_on_cuda_quantised_tensors_end_in_a_padded_row() -> None:
    narrow = dataclasses.replace(LLAMA_8B, n_kv_heads=(1,) * 32)  # rows of 128 elements: 384 more, in 12 blocks
    spec = ContextSpec(window=4096, kv_type="q4_0")
    host, cuda = (kv_bytes(narrow, spec, device=device) for device in (DeviceKind.HOST, DeviceKind.CUDA))
    assert cuda - host == 2 * 32 * 256  # 216 bytes each, aligned to 128
    assert kv_bytes(LLAMA_8B, spec, device=DeviceKind.HOST) == kv_bytes(LLAMA_8B, spec, device=DeviceKind.CUDA)


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
    spec = ContextSpec(window=4096, slots=3)
    for geometry in (LLAMA_8B, MAMBA):
        assert cache_bytes(geometry, spec) == kv_bytes(geometry, spec) + 3 * geometry.recurrent_bytes_per_sequence
        assert context_bytes(geometry, spec) == cache_bytes(geometry, spec) + compute_bytes(geometry, spec)


def test_each_slot_has_a_cache_and_a_row_of_logits_of_its_own() -> None:
    one, four = ContextSpec(window=1000), ContextSpec(window=1000, slots=4)
    for geometry in (LLAMA_8B, SLIDING, MAMBA):
        assert cache_bytes(geometry, four) == 4 * cache_bytes(geometry, one)
    wordy = dataclasses.replace(LLAMA_8B, n_vocab=10**9)
    assert compute_bytes(wordy, four) > 3.9 * compute_bytes(wordy, one)


def test_a_step_has_room_for_some_tokens_of_each_slot_and_no_more_than_the_windows_hold() -> None:
    assert (batch_tokens(ContextSpec(window=2048)), step_tokens(ContextSpec(window=2048, n_batch=2048))) == (512, 512)
    assert (batch_tokens(ContextSpec(window=100)), step_tokens(ContextSpec(window=100))) == (100, 100)
    assert batch_tokens(ContextSpec(window=100, slots=4)) == 400
    few = ContextSpec(window=2048, n_batch=2, n_ubatch=1)
    assert (batch_tokens(few), step_tokens(few)) == (2, 1)
    assert (batch_tokens(dataclasses.replace(few, slots=8)), step_tokens(dataclasses.replace(few, slots=8))) == (24, 24)


def test_a_prediction_says_that_it_does_not_know_what_a_gpu_leaves_to_the_host() -> None:
    for device, beside in ((DeviceKind.HOST, 0), (DeviceKind.CUDA, None)):
        plan = ModelPlan(ModelId("m"), ModelKey("m"), "m.gguf", device, 5 * MIB, LLAMA_8B)
        took = predicted(plan, ContextSpec(window=2048))
        assert (took.weights_bytes, took.kv_bytes) == (5 * MIB, 2048 * 128 * KIB)
        assert took.context_bytes == context_bytes(LLAMA_8B, ContextSpec(window=2048), device=device)
        assert took.host_bytes is took.host_weights_bytes is took.host_context_bytes is beside


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (ContextSpec(window=4096, kv_type="q5_9"), "KV type"),
        (ContextSpec(window=4096, slots=0), "1 to 256"),
        (ContextSpec(window=4096, slots=MAX_SLOTS + 1), "1 to 256"),
        (ContextSpec(window=0), "at least 1"),
        (ContextSpec(window=4096, n_batch=0), "at least 1"),
        (ContextSpec(window=4096, n_ubatch=0), "at least 1"),
        (ContextSpec(window=2**31 - 1, slots=2), "2 slots of 2147483647 tokens"),
        (ContextSpec(window=MAX_CONTEXT_TOKENS + 1), "counts to"),
        (ContextSpec(window=1 << 30, n_batch=MAX_BATCH_TOKENS + 1), "is the most"),
    ],
)
def test_parameters_that_would_end_llama_are_refused_with_the_reason(spec: ContextSpec, why: str) -> None:
    assert why in str(refusal(spec))


@given(specs)
def test_other_parameters_are_let_through(spec: ContextSpec) -> None:
    assert refusal(spec) is None
    assert refusal(ContextSpec(window=MAX_CONTEXT_TOKENS)) is None
    assert refusal(ContextSpec(window=256, slots=MAX_SLOTS, n_batch=1, n_ubatch=1)) is None


def test_a_ladder_grows_by_half_in_steps_of_256_up_to_the_whole_window() -> None:
    assert windows_ladder(4096, 16384) == (4096, 6144, 9216, 13824, 16384)
    assert windows_ladder(1, 1000) == (256, 512, 768, 1000)
    assert len(windows_ladder(4096, 172_032)) == 11


@pytest.mark.parametrize(("first", "full"), [(4096, 4096), (8192, 4096), (4000, 4096), (100, 50), (1, 1), (1, 256)])
def test_a_window_that_the_first_step_holds_is_the_whole_ladder(first: int, full: int) -> None:
    assert windows_ladder(first, full) == (full,)


def test_a_model_with_two_sets_of_rotation_factors_begins_with_those_that_its_whole_window_has() -> None:
    phi = dataclasses.replace(LLAMA_8B, rotation_changes_at=4096)
    assert first_rung(phi, 4096, 131_072) == 4097
    assert first_rung(phi, 8192, 131_072) == 8192
    assert first_rung(phi, 1024, 4096) == 1024
    assert first_rung(LLAMA_8B, 4096, 131_072) == 4096


def test_a_ladder_from_nothing_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        windows_ladder(0, 4096)


@given(st.integers(1, 1 << 20), st.integers(1, 2**31 - 1))
def test_every_ladder_ascends_overshoots_by_little_and_takes_cells_from_nobody(first: int, full: int) -> None:
    ladder = windows_ladder(first, full)
    cells = [slot_cells(ContextSpec(window=window)) for window in ladder]
    assert ladder[-1] == full
    assert all(after > before for before, after in itertools.pairwise(cells))
    assert all(after <= before * 1.5 + 256 for before, after in itertools.pairwise(ladder))
    assert cells[:-1] == list(ladder[:-1])


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
