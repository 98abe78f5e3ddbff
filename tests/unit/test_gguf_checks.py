"""What the header reader refuses although llama.cpp loads it, and what a header may cost."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import gguf
import pytest

from conductor.backend import gguf_file
from conductor.backend.gguf_header import read_header
from conductor.errors import BadModelFile
from tests.support.anatomy import ARRAY, Anatomy, take_apart
from tests.support.headers import BOOL, F32, STRING, U32, container, problem_of, replace, text, write_header
from tests.support.mutants import sentencepiece
from tests.support.mutations.words import put_list, tokens
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "good.gguf").read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


class TestFilesThatLlamaCppLoadsAndDiesOf:
    """What these hold ends the process at the first text or the first token, after a load and a dry run in which all was well."""

    @pytest.fixture
    def anatomy(self, good: bytes) -> Anatomy:
        return take_apart(good)

    @staticmethod
    def problem(path: Path, anatomy: Anatomy) -> str:
        path.write_bytes(anatomy.written())
        return problem_of(path)

    @pytest.mark.parametrize("architecture", ["bert", "t5", "gemma-embedding", "llada"])
    def test_models_that_do_not_write_token_by_token(self, path: Path, architecture: str) -> None:
        assert "token by token" in problem_of(write_header(path, architecture=architecture))

    def test_a_model_that_looks_at_what_comes_later(self, path: Path) -> None:
        assert "token by token" in problem_of(write_header(path, replace("llama.attention.causal", False, BOOL)))
        assert read_header(write_header(path, replace("llama.attention.causal", True, BOOL)))

    @pytest.mark.parametrize(
        ("key", "value", "said"),
        [
            ("rope.dimension_count", 3, "must be even, not 3"),
            ("rope.dimension_count", 6, "is 6, not between 2 and 4"),
            ("rope.dimension_count", 0, "is 0, not between 2 and 4"),
            ("rope.dimension_count_swa", 3, "must be even, not 3"),
            ("rope.dimension_count_swa", 8, "is 8, not between 2 and 4"),
            ("rope.dimension_count_swa", 0, "is 0, not between 2 and 4"),
            ("attention.group_norm_epsilon", -1.0, "must be a small number"),
        ],
    )
    def test_numbers_that_no_kernel_takes(self, path: Path, key: str, value: float, said: str) -> None:
        kind = F32 if isinstance(value, float) else U32
        assert said in problem_of(write_header(path, replace(f"llama.{key}", value, kind)))

    def test_architectures_that_turn_nothing_may_say_so(self, path: Path) -> None:
        assert read_header(write_header(path, replace("maple.rope.dimension_count", 0, U32), architecture="maple"))

    def test_a_rotation_about_no_axis(self, path: Path) -> None:
        edit = lambda sections: lambda writer: writer.add_array("llama.rope.dimension_sections", sections)
        assert "dimension_sections" in problem_of(write_header(path, edit([0, 0, 0, 0])))
        assert read_header(write_header(path, edit([1, 1, 0, 0])))

    @pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight"])
    @pytest.mark.parametrize("type_id", [26, 1])
    def test_vectors_that_are_not_of_32_bit_numbers(self, path: Path, anatomy: Anatomy, name: str, type_id: int) -> None:
        for info in anatomy.infos:
            if info.name == name.encode():
                info.type_id = type_id
                info.dims[0] *= 4 // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)][1]
        assert self.problem(path, anatomy) == f"tensor {name!r} must hold 32-bit numbers, not ggml's type {type_id}"

    def test_matrices_of_integers_unless_they_are_tables(self, path: Path, anatomy: Anatomy) -> None:
        [matrix] = [info for info in anatomy.infos if info.name == b"blk.0.ffn_up.weight"]
        matrix.type_id = 26
        assert "'blk.0.ffn_up.weight' is of ggml's type 26" in self.problem(path, anatomy)
        matrix.name = b"blk.0.ffn_gate_tid2eid.weight"
        path.write_bytes(anatomy.written())
        assert read_header(path)

    @pytest.mark.parametrize("model", ["none", "no_vocab", "bert", "t5", "test", "\x1b[2J"])
    def test_tokenizers_of_others(self, path: Path, model: str) -> None:
        assert repr(model) in problem_of(write_header(path, replace("tokenizer.ggml.model", model, STRING)))

    def test_a_pre_tokenizer_that_lets_spaces_through(self, path: Path) -> None:
        assert "'whitespace'" in problem_of(write_header(path, replace("tokenizer.ggml.pre", "whitespace", STRING)))

    def test_fewer_tokens_than_defaults_point_at(self, path: Path) -> None:
        assert "12 at least" in problem_of(write_header(path, rows=11))

    def test_a_tokenizer_that_begins_with_a_token_that_it_does_not_have(self, path: Path) -> None:
        gemma = replace("tokenizer.ggml.model", "gemma4", STRING)
        bos, eos, beyond = (
            replace(f"tokenizer.ggml.{which}_token_id", value, U32) for which, value in (("bos", 1), ("eos", 2), ("eos", 16))
        )
        assert read_header(write_header(path, gemma, bos, eos))
        assert "bos_token_id is missing" in problem_of(write_header(path, gemma, eos))
        assert "eos_token_id is 16" in problem_of(write_header(path, gemma, bos, beyond))

    def test_a_sentencepiece_vocabulary_without_a_byte(self, path: Path, anatomy: Anatomy) -> None:
        spm = sentencepiece(anatomy)
        known = tokens(spm)
        path.write_bytes(with_tokens(spm, known).written())
        assert read_header(path)
        known[known.index(b"<0x41>")] = b"A"  # stands for itself, as NUL cannot: to llama.cpp that is an empty text
        path.write_bytes(with_tokens(spm, known).written())
        assert read_header(path)
        known[known.index(b"<0xE2>")] = b"<0xFF>"  # UTF-8 has no FF
        assert "no token for 1 of the bytes in texts, as 0xe2" in self.problem(path, with_tokens(spm, known))
        known[known.index(b"<0x00>")] = b"\0"
        assert "no token for 2 of the bytes in texts, as 0x00" in self.problem(path, with_tokens(spm, known))

    @pytest.mark.parametrize(
        ("begins", "said"),
        [
            (rb"ab", "0x61"), (rb"\x61b", "0x61"), (rb"\\a", "0x5c"), (rb"\n\n", "0x0a"), (rb"\xzzb", "0x53"), (b"", "0x5b"),
            (b"\0ab", "0x5b"), (rb"\x4", ""), ("é".encode(), "0xc3"), (b"ab\0", "0x61"), (rb"\x\xffAB", "0xe1"),
        ],
    )  # fmt: skip
    def test_an_rwkv_vocabulary_without_the_first_byte_of_a_token(
        self, path: Path, anatomy: Anatomy, begins: bytes, said: str
    ) -> None:
        """llama.cpp's search for the longest token would begin again, for ever."""
        n = len(tokens(anatomy))
        known = [b"\\x%02x" % byte for byte in range(256)] + [b"\\x00%d" % i for i in range(n - 256)]
        rwkv = with_tokens(anatomy, known)
        rwkv.put("tokenizer.ggml.model", 8, b"rwkv")
        path.write_bytes(rwkv.written())
        assert read_header(path)
        if said:
            byte = int(said, 16)
            known[byte], known[-1] = b"\\x00again", begins
            assert said in self.problem(path, with_tokens(rwkv, known))
        else:
            known[-1] = begins
            path.write_bytes(with_tokens(rwkv, known).written())
            assert read_header(path)

    @pytest.mark.parametrize("name", ["", "evil\x1b[2J", "a" * 65, "Llama", "../x"])
    def test_architectures_that_are_no_names(self, path: Path, anatomy: Anatomy, name: str) -> None:
        anatomy.put("general.architecture", 8, name.encode())
        assert "\x1b" not in self.problem(path, anatomy)
        assert "general.architecture is no name" in problem_of(path)


def with_tokens(anatomy: Anatomy, known: list[bytes]) -> Anatomy:
    put_list(anatomy, "tokens", 8, known)
    return anatomy


class TestFilesThatAskForMuch:
    """What a header may cost, in time and in memory."""

    @staticmethod
    def header_of(path: Path, *entries: bytes, n_tensors: int = 0, size: int = 1 << 30) -> Path:
        path.write_bytes(container(*entries, n_tensors=n_tensors))
        os.truncate(path, size)
        return path

    @staticmethod
    def key(name: bytes, type_id: int, value: bytes) -> bytes:
        return text(name) + struct.pack("<I", type_id) + value

    def test_lists_of_a_few_million_texts_in_all(self, path: Path) -> None:
        empty_texts = struct.pack("<IQ", 8, gguf_file.MAX_STRINGS // 2) + bytes(8 * (gguf_file.MAX_STRINGS // 2))
        entries = [self.key(b"%d" % i, ARRAY, empty_texts) for i in range(3)]
        assert "absurd count: metadata key '2'" in problem_of(self.header_of(path, *entries))

    def test_of_a_long_text_only_the_beginning_is_kept(self, path: Path) -> None:
        header = read_header(write_tiny_gguf(path, chat_template="\U0001f600" * 100_000))
        kept = header.metadata["tokenizer.chat_template"]
        assert isinstance(kept, str)
        assert len(kept) <= gguf_file.MAX_TEXT_BYTES_KEPT
        assert header.has_chat_template

    def test_more_keys_or_tensors_than_any_model_has(self, path: Path) -> None:
        for counts in ((0, gguf_file.MAX_KEYS + 1), (gguf_file.MAX_TENSORS + 1, 0)):
            path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(100))
            assert "absurd counts" in problem_of(path)

    def test_a_header_that_does_not_end(self, path: Path) -> None:
        entry = self.key(b"a", 8, struct.pack("<Q", 1 << 29))
        assert "longer than" in problem_of(self.header_of(path, entry))

    def test_a_file_that_becomes_shorter_while_it_is_read_ends_nobody(self, path: Path, good: bytes) -> None:
        """A mapped file would end the process with SIGBUS."""
        done = threading.Event()

        def shorten() -> None:
            while not done.is_set():
                path.write_bytes(good)
                os.truncate(path, 3000)

        thread = threading.Thread(target=shorten)
        thread.start()
        try:
            for _ in range(300):
                try:
                    read_header(path)
                except BadModelFile:
                    pass
        finally:
            done.set()
            thread.join()
