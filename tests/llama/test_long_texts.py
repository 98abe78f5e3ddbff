"""Texts of any length are tokenised: where llama.cpp uses std::regex, 28,000 letters in a row would end the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from conductor.backend.llama import Llama
from conductor.types import DeviceKind
from tests.support.anatomy import STRING
from tests.support.mutants import bases


@pytest.mark.parametrize("pre", ["default", "deepseek-llm", "tekken", "gpt-4o", "exaone-moe", "qwen2"])
def test_a_hundred_thousand_characters_of_a_kind(tmp_path: Path, pre: str) -> None:
    anatomy = bases()[0]
    anatomy.put("tokenizer.ggml.pre", STRING, pre.encode())
    path = tmp_path / "model.gguf"
    path.write_bytes(anatomy.written())
    model = Llama.instance().load(str(path), DeviceKind.HOST, dry=True)
    try:
        for letter in "a !1\u4e2d":
            assert len(model.tokenize(letter * 100_000, add_special=False, parse_special=True)) >= 10_000
    finally:
        model.close()
