"""The header reader: what it finds in good files, and the sentence with which it refuses each kind of bad one."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from conductor.backend.gguf_header import GgufHeader, read_header
from conductor.errors import BadModelFile
from tests.support.headers import BOOL, F32, STRING, U32, container, problem_of, remove, replace, text, write_header
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf").read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


class TestGoodFiles:
    def test_a_llama_header_gives_its_geometry_and_names(self, path: Path) -> None:
        header = read_header(
            write_tiny_gguf(path, n_layer=3, n_embd=64, n_head=4, n_kv_head=2, n_ff=128, n_vocab=320, trained_window=2048)
        )
        g = header.geometry
        assert (header.architecture, header.name, header.has_chat_template) == ("llama", "tiny llama", True)
        assert (g.n_layer, g.n_embd, g.n_head, g.n_kv_heads, g.n_ff) == (3, 64, 4, (2, 2, 2), 128)
        assert (g.head_dim_k, g.head_dim_v, g.n_vocab, g.trained_window) == (16, 16, 320, 2048)
        assert (g.sliding_window, any(g.sliding_layers), g.recurrent_bytes_per_sequence) == (0, False, 0)

    def test_two_sets_of_rotation_factors_are_seen_with_the_window_where_they_change(self, path: Path) -> None:
        assert read_header(write_header(path)).geometry.rotation_changes_at == 0
        factors = [
            lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)),
            lambda w: w.add_rope_scaling_orig_ctx_len(512),
        ]
        assert read_header(write_header(path, *factors)).geometry.rotation_changes_at == 512

    def test_an_absent_chat_template_is_seen(self, path: Path) -> None:
        assert not read_header(write_tiny_gguf(path, chat_template=None)).has_chat_template

    def test_every_sixth_layer_of_gemma3_is_full(self, path: Path) -> None:
        g = read_header(write_tiny_gguf(path, architecture="gemma3", n_layer=7, sliding_window=512)).geometry
        assert g.sliding_window == 512
        assert g.sliding_layers == (True, True, True, True, True, False, True)

    def test_mamba_has_a_state_and_no_kv(self, path: Path) -> None:
        g = read_header(write_tiny_gguf(path, architecture="mamba", n_embd=64, n_layer=2)).geometry
        assert g.n_kv_heads == (0, 0)
        assert g.recurrent_bytes_per_sequence == 2 * 4 * (3 * 128 + 16 * 128)

    def test_kv_heads_may_differ_between_layers(self, path: Path) -> None:
        header = read_header(write_header(path, lambda w: w.add_head_count_kv([2, 1])))
        assert header.geometry.n_kv_heads == (2, 1)

    def test_layers_without_kv_heads_are_the_recurrent_ones_of_a_hybrid(self, path: Path) -> None:
        ssm = (("add_ssm_conv_kernel", 4), ("add_ssm_inner_size", 16), ("add_ssm_state_size", 8))
        edits = [lambda w, name=name, value=value: getattr(w, name)(value) for name, value in ssm]
        g = read_header(write_header(path, lambda w: w.add_head_count_kv([2, 0]), *edits, architecture="jamba")).geometry
        assert (g.n_kv_heads, g.recurrent_bytes_per_sequence) == ((2, 0), 4 * (3 * 16 + 8 * 16))

    def test_the_experts_that_a_token_uses_count_as_its_hidden_layer(self, path: Path) -> None:
        edits = (replace("llama.expert_used_count", 2, U32), replace("llama.expert_feed_forward_length", 24, U32))
        assert read_header(write_header(path, *edits)).geometry.n_ff == 48

    def test_untied_embeddings_stay_on_the_host_and_tied_ones_are_copied_to_the_gpu(self, path: Path) -> None:
        embeddings = 320 * 64 * 4
        untied = read_header(write_tiny_gguf(path, n_vocab=320)).geometry
        tied = read_header(write_tiny_gguf(path, n_vocab=320, tied=True)).geometry
        assert untied.weights_bytes_host - untied.weights_bytes_offloaded == embeddings
        assert tied.weights_bytes_host == tied.weights_bytes_offloaded == untied.weights_bytes_offloaded

    def test_quantised_rows_are_padded_on_a_gpu(self, path: Path) -> None:
        wide = read_header(write_tiny_gguf(path, n_embd=512, n_ff=512, tied=True, file_type="q8_0", hollow=True)).geometry
        narrow = read_header(write_tiny_gguf(path, n_embd=64, tied=True, file_type="q8_0", hollow=True)).geometry
        assert wide.weights_bytes_offloaded == wide.weights_bytes_host
        assert narrow.weights_bytes_offloaded > narrow.weights_bytes_host

    def test_a_path_may_be_a_path_object_or_text(self, path: Path) -> None:
        write_tiny_gguf(path)
        assert read_header(path) == read_header(str(path))


class TestFilesThatAreNoModels:
    def test_missing(self, path: Path) -> None:
        assert problem_of(path) == "no such file"

    def test_below_a_file(self, path: Path) -> None:
        path.touch()
        assert problem_of(path / "x.gguf") == "no such file"

    def test_a_name_that_no_file_can_have(self) -> None:
        assert problem_of("model\0.gguf") == problem_of("model\ud800.gguf") == "no such file"
        assert "cannot be read" in problem_of("x" * 5000)

    def test_a_directory(self, tmp_path: Path) -> None:
        assert problem_of(tmp_path) == "is a directory"

    def test_a_pipe_is_refused_and_not_waited_for(self, path: Path) -> None:
        os.mkfifo(path)
        assert problem_of(path) == "is not a regular file"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable(self, path: Path) -> None:
        write_tiny_gguf(path).chmod(0)
        assert "Permission denied" in problem_of(path)

    def test_empty(self, path: Path) -> None:
        path.touch()
        assert problem_of(path) == "the file is empty"

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"\x00\x01\x02\x03rest", r"begins with b'\x00\x01\x02\x03'"),
            (b"G", "begins with b'G'"),
            (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
            (b"<!DOCTYPE html>", "web page"),
            (b"PK\x03\x04....", "zip archive"),
        ],
    )
    def test_other_formats_are_named_by_their_first_bytes(self, path: Path, content: bytes, said: str) -> None:
        path.write_bytes(content)
        problem = problem_of(path)
        assert "not a GGUF file" in problem
        assert said in problem

    @pytest.mark.parametrize(("version", "said"), [(1, "version 1"), (4, "version 4"), (0, "version 0"), (3 << 24, "big-endian")])
    def test_other_versions(self, path: Path, good: bytes, version: int, said: str) -> None:
        path.write_bytes(good[:4] + struct.pack("<I", version) + good[8:])
        assert said in problem_of(path)

    def test_a_projector_or_adapter(self, path: Path) -> None:
        assert "'adapter'" in problem_of(write_header(path, replace("general.type", "adapter", STRING)))

    def test_a_part_of_a_split_model(self, path: Path) -> None:
        assert "split" in problem_of(write_header(path, replace("split.count", 3, gguf.GGUFValueType.UINT16)))


class TestDamagedFiles:
    def test_truncated_tensor_data_says_what_was_expected(self, path: Path, good: bytes) -> None:
        path.write_bytes(good[:-1000])
        problem = problem_of(path)
        assert "truncated" in problem
        assert f"the file has {len(good) - 1000}" in problem

    @pytest.mark.parametrize("length", [4, 7, 8, 20, 24, 100, 1000, 4000])
    def test_truncated_header(self, path: Path, good: bytes, length: int) -> None:
        path.write_bytes(good[:length])
        assert "truncated" in problem_of(path)

    @pytest.mark.parametrize("offset", [8, 16])
    def test_absurd_counts(self, path: Path, good: bytes, offset: int) -> None:
        path.write_bytes(good[:offset] + struct.pack("<Q", 1 << 60) + good[offset + 8 :])
        assert "absurd counts" in problem_of(path)

    def test_a_key_twice(self, path: Path) -> None:
        entry = text(b"a") + struct.pack("<IB", 0, 1)
        path.write_bytes(container(entry, entry))
        assert problem_of(path) == "metadata key 'a' appears twice"

    def test_a_key_that_is_not_utf8(self, path: Path) -> None:
        path.write_bytes(container(text(b"\xff\xfe") + struct.pack("<IB", 0, 1)))
        assert "not UTF-8" in problem_of(path)

    def test_unknown_value_types(self, path: Path) -> None:
        path.write_bytes(container(text(b"a") + struct.pack("<IQ", 77, 1)))
        assert "unknown value type 77" in problem_of(path)
        path.write_bytes(container(text(b"a") + struct.pack("<IIQ", 9, 9, 1)))
        assert "unsupported type 9" in problem_of(path)

    @pytest.mark.parametrize("type_id", [4, 8])
    @pytest.mark.parametrize("count", [2000, (1 << 64) - 1])
    def test_lists_longer_than_the_file(self, path: Path, type_id: int, count: int) -> None:
        path.write_bytes(container(text(b"a") + struct.pack("<IIQ", 9, type_id, count) + bytes(100)))
        assert any(word in problem_of(path) for word in ("truncated", "absurd"))

    def test_strings_longer_than_the_file(self, path: Path) -> None:
        path.write_bytes(container(text(b"a") + struct.pack("<IQ", 8, 1 << 63)))
        assert "truncated" in problem_of(path)
        path.write_bytes(container(text(b"a") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63)))
        assert "truncated" in problem_of(path)

    @pytest.mark.parametrize(
        ("dims", "type_id", "offset", "said"),
        [
            ((1 << 40, 1 << 40), 0, 0, "absurd dimensions"),
            ((0,), 0, 0, "absurd dimensions"),
            ((1,) * 5, 0, 0, "5 dimensions"),
            ((), 0, 0, "0 dimensions"),
            ((8,), 5, 0, "unknown type 5"),
            ((33,), 8, 0, "not a multiple"),
            ((8,), 0, 64, "expected 0"),
            ((8,), 0, 0, "truncated"),
        ],
    )
    def test_bad_tensors(self, path: Path, dims: tuple[int, ...], type_id: int, offset: int, said: str) -> None:
        entry = text(b"t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)
        path.write_bytes(container(entry, n_tensors=1))
        assert said in problem_of(path)

    def test_random_damage_ends_in_a_header_or_in_bad_model_file(self, path: Path, good: bytes) -> None:
        rng = random.Random(0)
        header_bytes = 8000  # of it: everything before the tensor data
        for _ in range(500):
            damaged = bytearray(good)
            for _ in range(rng.choice((1, 1, 2, 8))):
                damaged[rng.randrange(header_bytes)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
            if rng.random() < 0.2:
                del damaged[rng.randrange(len(damaged)) :]
            path.write_bytes(damaged)
            try:
                assert isinstance(read_header(path), GgufHeader)
            except BadModelFile:
                pass

    def test_random_bytes_after_the_magic_end_in_bad_model_file(self, path: Path) -> None:
        rng = random.Random(1)
        for _ in range(200):
            path.write_bytes(
                b"GGUF" + struct.pack("<IQQ", 3, rng.randrange(3), rng.randrange(9)) + rng.randbytes(rng.randrange(300))
            )
            problem_of(path)


class TestMetadataThatMakesNoSense:
    @pytest.mark.parametrize(
        "key",
        ["llama.block_count", "llama.embedding_length", "llama.context_length", "llama.attention.head_count",
         "general.architecture", "tokenizer.ggml.tokens"],
    )  # fmt: skip
    def test_missing_keys_are_named(self, path: Path, key: str) -> None:
        assert f"{key} is missing" in problem_of(write_header(path, remove(key)))

    @pytest.mark.parametrize(
        ("key", "value", "kind", "said"),
        [
            ("llama.block_count", 0, U32, "is 0, not between 1 and 512"),
            ("llama.block_count", 513, U32, "is 513"),
            ("llama.block_count", "two", STRING, "must be a whole number, not 'two'"),
            ("llama.block_count", True, BOOL, "must be a whole number, not True"),
            ("llama.block_count", 2.0, F32, "must be a whole number, not 2.0"),
            ("llama.embedding_length", 0, U32, "is 0"),
            ("llama.context_length", 0, U32, "is 0"),
            ("llama.attention.head_count", 0, U32, "is 0"),
            ("llama.attention.head_count", 3, U32, "do not divide the embedding length 8"),
            ("llama.attention.head_count_kv", 0, U32, "is 0"),
            ("llama.attention.head_count_kv", 4, U32, "layer 0: 4 KV heads do not divide 2 heads"),
            ("llama.attention.key_length", 0, U32, "is 0"),
            ("llama.attention.layer_norm_rms_epsilon", float("nan"), F32, "not nan"),
            ("llama.attention.layer_norm_rms_epsilon", -1.0, F32, "not -1.0"),
            ("llama.attention.layer_norm_rms_epsilon", float("inf"), F32, "not inf"),
            ("llama.attention.layer_norm_rms_epsilon", 1, U32, "must be a fraction"),
            ("llama.feed_forward_length", "wide", STRING, "must be a whole number"),
            ("general.architecture", 7, U32, "must be text, not 7"),
            ("general.alignment", 0, U32, "power of two"),
            ("general.alignment", 48, U32, "power of two"),
            ("general.alignment", "x", STRING, "power of two"),
            ("tokenizer.ggml.tokens", "none", STRING, "not a list of strings"),
            ("split.count", "x", STRING, "must be a whole number"),
        ],
    )
    def test_wrong_values_are_named(self, path: Path, key: str, value: object, kind: gguf.GGUFValueType, said: str) -> None:
        assert said in problem_of(write_header(path, replace(key, value, kind)))

    def test_a_list_for_another_number_of_layers(self, path: Path) -> None:
        assert "lists 3 values for 2 layers" in problem_of(write_header(path, lambda w: w.add_head_count_kv([2, 2, 2])))

    def test_tokens_that_do_not_match_the_embedding_table(self, path: Path) -> None:
        problem = problem_of(write_header(path, remove("tokenizer.ggml.tokens"), lambda w: w.add_token_list(["a"] * 5)))
        assert problem == "tokenizer.ggml.tokens has 5 entries, the embedding table 16"

    def test_scores_that_do_not_match_the_embedding_table(self, path: Path) -> None:
        assert "scores has 3 entries" in problem_of(write_header(path, lambda w: w.add_token_scores([0.0] * 3)))

    def test_an_embedding_table_of_another_width(self, path: Path) -> None:
        assert "not 16 by" in problem_of(write_header(path, replace("llama.embedding_length", 16, U32)))

    def test_a_sliding_pattern_that_llama_cpp_aborts_on(self, path: Path) -> None:
        edits = (lambda w: w.add_sliding_window(512), lambda w: w.add_sliding_window_pattern(1))
        assert "sliding_window_pattern is 1" in problem_of(write_header(path, *edits, architecture="gemma3"))
