"""The estimate against real llama.cpp contexts: weights and KV exact, compute never below and not far above."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import pytest

from conductor.backend.gguf_file import BLOCKS
from conductor.backend.gguf_header import read_header
from conductor.core.estimate import Geometry, cache_bytes, compute_bytes, context_bytes
from conductor.types import ContextSpec, DeviceKind
from conductor.units import MIB
from tests.support.breakdown import Breakdown, measure, opened_context, opened_model
from tests.support.tiny_gguf import write_tiny_gguf

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "models").glob("*.gguf"))

SPECS = (
    ContextSpec(window=1),
    ContextSpec(window=256),
    ContextSpec(window=1000),
    ContextSpec(window=2048, n_ubatch=128),
    ContextSpec(window=2048, n_batch=2048, n_ubatch=1024),
    ContextSpec(window=2048, kv_type="f32"),
    ContextSpec(window=2048, kv_type="q8_0"),
    ContextSpec(window=4096, kv_type="q4_0"),
    ContextSpec(window=2048, kv_type="f32", flash_attention=False),
    ContextSpec(window=1000, flash_attention=False),
    ContextSpec(window=1000, slots=3),
    ContextSpec(window=2048, slots=8, n_ubatch=128),
    ContextSpec(window=2048, slots=4, kv_type="q8_0"),
    ContextSpec(window=512, slots=5, flash_attention=False),
)
LARGE_SPECS = (
    *SPECS,
    ContextSpec(window=32768),
    ContextSpec(window=131072, kv_type="q8_0"),
    ContextSpec(window=8192, n_ubatch=64),
    ContextSpec(window=16384, slots=8),
    ContextSpec(window=8192, slots=6, kv_type="f32", n_ubatch=256),
)

#: true geometries, made hollow and run dry
LARGE: dict[str, dict[str, Any]] = {
    "llama 8B": {"n_layer": 32, "n_embd": 4096, "n_head": 32, "n_kv_head": 8, "n_ff": 14336, "n_vocab": 128256},
    "llama 1B": {"n_layer": 16, "n_embd": 2048, "n_head": 32, "n_kv_head": 8, "n_ff": 8192, "n_vocab": 128256, "tied": True},
    "smollm 360M": {"n_layer": 32, "n_embd": 960, "n_head": 15, "n_kv_head": 5, "n_ff": 2560, "n_vocab": 49152, "tied": True},
    "qwen2 0.5B": {
        "architecture": "qwen2", "n_layer": 24, "n_embd": 896, "n_head": 14, "n_kv_head": 2, "n_ff": 4864, "n_vocab": 151936,
        "tied": True,
    },
    "qwen2 7B": {
        "architecture": "qwen2", "n_layer": 28, "n_embd": 3584, "n_head": 28, "n_kv_head": 4, "n_ff": 18944, "n_vocab": 152064,
    },
}  # fmt: skip

#: times the real figure, for buffers of some MiB; `Estimator.how` repeats it
MOST_ABOVE = {"llama": 1.6, "qwen2": 1.6, "gemma3": 1.9, "mamba": 1.9}


def hold_against(real: Breakdown, geometry: Geometry, spec: ContextSpec, *, at_most: float = 1.35) -> None:
    assert geometry.weights_bytes_host == real.model_bytes
    assert cache_bytes(geometry, spec, device=DeviceKind.HOST) == real.context_bytes
    assert real.compute_bytes <= compute_bytes(geometry, spec, device=DeviceKind.HOST) <= at_most * real.compute_bytes + MIB
    total = real.context_bytes + real.compute_bytes
    assert total <= context_bytes(geometry, spec, device=DeviceKind.HOST) <= at_most * total + MIB


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("file_type", ["f32", "q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_tiny_models_really_loaded_match_the_estimate(tmp_path: Path, architecture: str, file_type: str, tied: bool) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", architecture=architecture, file_type=file_type, tied=tied,
        n_layer=3, n_embd=256, n_head=4, n_ff=768, n_vocab=1001,
    )  # fmt: skip
    geometry = read_header(path).geometry
    with opened_model(path) as model:
        for spec in SPECS:
            hold_against(measure(model, spec), geometry, spec)


@pytest.mark.parametrize("name", LARGE)
def test_true_geometries_run_dry_match_the_estimate(tmp_path: Path, name: str) -> None:
    path = write_tiny_gguf(tmp_path / "hollow.gguf", **LARGE[name], file_type="q8_0", trained_window=131072, hollow=True)
    geometry = read_header(path).geometry
    with opened_model(path, dry=True) as model:
        for spec in LARGE_SPECS:
            hold_against(measure(model, spec), geometry, spec)


@pytest.mark.parametrize("architecture", ["gemma3", "mamba"])
def test_other_architectures_are_never_below_and_get_the_larger_margin(tmp_path: Path, architecture: str) -> None:
    path = write_tiny_gguf(
        tmp_path / "hollow.gguf", architecture=architecture, n_layer=8, n_embd=1024, n_head=4, n_kv_head=1, head_dim=256,
        n_ff=6912, n_vocab=32000, sliding_window=512, trained_window=32768, hollow=True,
    )  # fmt: skip
    geometry = read_header(path).geometry
    with opened_model(path, dry=True) as model:
        for spec in SPECS:
            hold_against(measure(model, spec), geometry, spec, at_most=1.6)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "mamba"])
def test_random_geometries_and_slots_are_never_below_the_real_figure(tmp_path: Path, architecture: str) -> None:
    chance = random.Random(architecture)
    path = tmp_path / "hollow.gguf"
    for _ in range(8):
        geometry = read_header(write_tiny_gguf(path, **random_geometry(chance, architecture), hollow=True)).geometry
        with opened_model(path, dry=True) as model:
            for _ in range(5):
                spec = random_spec(chance)
                hold_against(measure(model, spec), geometry, spec, at_most=MOST_ABOVE[architecture])


def random_geometry(chance: random.Random, architecture: str) -> dict[str, Any]:
    n_head, head_dim = chance.choice((8, 16, 32)), chance.choice((64, 96, 128))
    return {
        "architecture": architecture,
        "n_layer": 7 if architecture == "gemma3" else chance.randint(2, 5),
        "n_head": n_head,
        "n_kv_head": chance.choice((1, 2, 4, 8)),
        "head_dim": head_dim,
        "n_embd": n_head * head_dim,
        "n_ff": n_head * head_dim * chance.randint(2, 6),
        "n_vocab": chance.choice((1000, 30000)),
        "tied": chance.random() < 0.5,
    }


def random_spec(chance: random.Random) -> ContextSpec:
    flash = chance.random() < 0.7
    return ContextSpec(
        window=chance.choice((1, 1000, 4096, 30000) if flash else (1, 1000, 4096)),
        slots=chance.randint(1, 8),
        n_batch=chance.choice((64, 512, 2048)),
        n_ubatch=chance.choice((16, 128, 512, 1024)),
        kv_type=chance.choice(("f16", "f32", "q8_0", "q4_0") if flash else ("f16", "f32")),
        flash_attention=flash,
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_models_match_the_estimate(path: Path) -> None:
    geometry = read_header(path).geometry
    with opened_model(path) as model:
        for spec in SPECS:
            hold_against(measure(model, spec), geometry, spec)


def test_tensor_types_have_the_block_sizes_of_ggml() -> None:
    lib = llama._lib  # the only ggml of this process, see breakdown.py
    lib.ggml_blck_size.restype, lib.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
    for type_id, sizes in BLOCKS.items():
        assert (lib.ggml_blck_size(type_id), lib.ggml_type_size(type_id)) == sizes


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "mamba"])
def test_tiny_models_tokenise_any_text_and_decode_it(tmp_path: Path, architecture: str) -> None:
    text = "hello wörld, 你好 🎉\n\tagent \u0000 end".encode()
    with opened_model(write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture)) as model:
        tokens = tokenise(model, text)
        assert b"".join(piece(model, token) for token in tokens) == text
        assert decode(model, tokens) == 0


def tokenise(model: Any, text: bytes) -> Any:
    room = (llama.llama_token * (len(text) + 8))()
    count = llama.llama_tokenize(llama.llama_model_get_vocab(model), text, len(text), room, len(room), False, True)
    assert count > 0
    return (llama.llama_token * count)(*room[:count])


def piece(model: Any, token: int) -> bytes:
    room = ctypes.create_string_buffer(64)
    count = llama.llama_token_to_piece(llama.llama_model_get_vocab(model), token, room, len(room), 0, True)
    return room.raw[:count]


def decode(model: Any, tokens: Any) -> int:
    with opened_context(model, ContextSpec(window=256)) as context:
        return int(llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(tokens))))
