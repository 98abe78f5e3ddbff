"""Files of hardly more than a header, and what the reader says of a bad one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from conductor.backend.gguf_header import read_header
from conductor.errors import BadModelFile

Edit = Callable[[gguf.GGUFWriter], object]
U32, F32, STRING, BOOL = (gguf.GGUFValueType[name] for name in ("UINT32", "FLOAT32", "STRING", "BOOL"))


def write_header(path: Path, *edits: Edit, rows: int = 16, architecture: str = "llama", n_embd: int = 8) -> Path:
    """A file of one tensor and the least metadata, after `edits`, each of which may add a key or replace one."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(rows)])
    for edit in edits:
        edit(writer)
    writer.add_tensor("token_embd.weight", np.zeros((rows, n_embd), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def replace(key: str, value: object, kind: gguf.GGUFValueType) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    return edit


def remove(key: str) -> Edit:
    return lambda writer: writer.kv_data[0].pop(key)


def problem_of(path: Path | str) -> str:
    with pytest.raises(BadModelFile) as caught:
        read_header(path)
    assert caught.value.path == str(path)
    return caught.value.problem


def container(*entries: bytes, n_tensors: int = 0) -> bytes:
    """A GGUF file of these metadata entries and then tensor entries."""
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(entries) - n_tensors) + b"".join(entries)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value
