"""What llama.cpp loads without a word, and dies of at a turn: refused here, by name.

Neither its loader nor a dry run finds these, for they end the process at the first text that is tokenised or the first
token that is decoded. Each was found by a mutant (`tests/support/mutants.py`); the places named are in llama.cpp b11312.
Does not cover what the loader refuses or dies of: that is the dry run's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from conductor.backend.gguf_file import Array, GgufFile, Malformed, Tensor
from conductor.backend.gguf_keys import Keys

#: They read a text as a whole, or make one as a whole, or serve another model: no token follows from those before it.
NOT_GENERATING = frozenset({
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
    "gemma-embedding", "llama-embed", "t5", "t5encoder", "clip", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1",
    "eagle3", "dflash", "gemma4-assistant",
})  # fmt: skip

#: Those whose files may say that nothing is turned by position: none of their layers is, or the sliding ones alone.
NOT_TURNING = frozenset({"maple", "jamba", "nemotron_h", "nemotron_h_moe", "kimi-linear"})

#: Of the others "bert" and "t5" are encoders', and with "none" there is no text at all.
TOKENIZERS = ("gpt2", "llama", "gemma4", "rwkv", "plamo2", "hybriddna")
LEAST_TOKENS = 12  #: llama.cpp's defaults for special tokens lie below

F32 = 0
#: ggml types that no multiplication has a kernel for: Q8_1, Q8_K, the integers and F64
NO_WEIGHTS = frozenset({9, 15, 24, 25, 26, 27, 28})
#: names of tensors that are tables of whole numbers
TABLES = ("tid2eid",)
#: parts of the names of matrices that are used number by number, or by kernels that know F32 alone
NUMBER_BY_NUMBER = ("_norm.weight", "ssm_conv1d", "shortconv.conv.", "time_mix_lerp", "time_mix_first.")

#: bytes that UTF-8 consists of
UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))


def check_generates(architecture: str, keys: Keys) -> None:
    """llama_context: a model without a memory goes to `encode`, and one that is not causal takes no batch of several steps."""
    if architecture in NOT_GENERATING or keys.get("attention.causal") is False:
        raise Malformed(f"does not write text token by token (architecture {architecture}): an encoder, or a part of a model?")


def check_norms(keys: Keys) -> None:
    """ggml_rms_norm and its kin: GGML_ASSERT(eps >= 0.0f)."""
    for kind in ("layer_norm_rms", "layer_norm", "group_norm"):
        keys.check_small_fraction(f"attention.{kind}_epsilon")


def check_rotation(architecture: str, keys: Keys, head_dim: int) -> None:
    """ggml_rope: as many numbers of each head are turned as is said, in pairs, and of several axes at least one has some.

    With none it does not come back, but for architectures that do not call it then.
    """
    if head_dim == 0:
        return
    least = 0 if architecture in NOT_TURNING else 2
    turned = keys.integer("rope.dimension_count", default=head_dim, least=least, most=head_dim)
    sliding_dim = keys.integer("attention.key_length_swa", default=head_dim)
    sliding = keys.integer("rope.dimension_count_swa", default=min(turned, sliding_dim), least=least, most=sliding_dim)
    if turned % 2 or sliding % 2:
        raise Malformed(f"{keys.prefix}rope.dimension_count must be even, not {turned if turned % 2 else sliding}")
    sections = keys.get("rope.dimension_sections")
    if isinstance(sections, Array) and (sections.values is None or not any(value > 0 for value in sections.values)):
        raise Malformed(f"{keys.prefix}rope.dimension_sections must hold a number above 0")


def check_tensor_types(tensors: Mapping[str, Tensor]) -> None:
    """ggml-cpu: mul_mat has no kernel, or binary_op knows no such pair of types."""
    for tensor in tensors.values():
        is_vector = math.prod(tensor.dims[1:]) == 1 or not tensor.name.endswith(".weight")
        if tensor.type_id != F32 and (is_vector or any(part in tensor.name for part in NUMBER_BY_NUMBER)):
            raise Malformed(f"tensor {tensor.name[:80]!r} must hold 32-bit numbers, not ggml's type {tensor.type_id}")
        if tensor.type_id in NO_WEIGHTS and not any(part in tensor.name for part in TABLES):
            raise Malformed(f"tensor {tensor.name[:80]!r} is of ggml's type {tensor.type_id}, which no weights have")


def check_tokenizer(file: GgufFile) -> None:
    """llama_vocab: whatever text comes, each of its bytes must end up as some token."""
    keys = Keys(file.metadata, prefix="tokenizer.ggml.")
    model, pre, tokens = keys.text("model"), keys.get("pre"), keys.get("tokens")
    if model not in TOKENIZERS:
        raise Malformed(f"tokenizer.ggml.model is {model[:40]!r}; supported are {', '.join(TOKENIZERS)}")
    if not isinstance(tokens, Array) or tokens.count < LEAST_TOKENS:
        raise Malformed(f"tokenizer.ggml.tokens must be a list of {LEAST_TOKENS} at least")
    if pre == "whitespace":  # keeps spaces, which its merges must not have: GGML_ASSERT in find_bpe_rank
        raise Malformed("tokenizer.ggml.pre is 'whitespace', which only encoders use")
    if model == "gemma4":  # without defaults: GGML_ASSERT(token_bos() != LLAMA_TOKEN_NULL)
        keys.integer("bos_token_id", least=0, most=tokens.count - 1)
        keys.integer("eos_token_id", least=0, most=tokens.count - 1)
    if model == "llama":  # byte_to_token throws
        _require(set(UTF8_BYTES), _sentencepiece_bytes(file))
    if model == "rwkv":  # its search for the longest token begins anew, for ever, where none fits after the first byte
        words = [_unescaped(_as_read(text)) for text in file.strings("tokenizer.ggml.tokens")]
        _require({word[0] for word in words if word}, {word[0] for word in words if len(word) == 1})


def _require(wanted: set[int], found: set[int]) -> None:
    if missing := sorted(wanted - found):
        raise Malformed(f"its vocabulary has no token for {len(missing)} of the bytes in texts, as {missing[0]:#04x}")


def _sentencepiece_bytes(file: GgufFile) -> set[int]:
    """The bytes that have a token of their own, as <0x41> or as A. Not NUL as itself: to llama.cpp that is an empty text."""
    names = {b"<0x%02X>" % byte: byte for byte in range(256)} | {bytes((byte,)): byte for byte in range(1, 256)}
    return {names[text] for text in file.strings("tokenizer.ggml.tokens", most=len("<0x41>")) if text in names}


def _as_read(text: bytes) -> bytes:
    """As far as llama.cpp reads it, or the beginning of what it puts in the place of an empty one."""
    return text.partition(b"\0")[0] or b"[EMPTY_"


def _unescaped(text: bytes) -> bytes:
    r"""The first two bytes that an RWKV token stands for, whose text has \t, \n, \r, \x41 and \ before any other."""
    found = bytearray()
    position = 0
    while position < len(text) and len(found) < 2:
        if text[position : position + 1] != b"\\":
            found.append(text[position])
            position += 1
        elif text[position + 1 : position + 2] == b"x":
            if position + 4 <= len(text):
                found.append((_digit(text[position + 2]) * 16 + _digit(text[position + 3])) % 256)
            position += 4
        else:
            found += text[position + 1 : position + 2].translate(bytes.maketrans(b"tnr", b"\t\n\r"))
            position += 2
    return bytes(found)


def _digit(character: int) -> int:
    """Of a hexadecimal number; of what is none, what llama.cpp makes of it."""
    signed = character - 256 if character > 127 else character
    return signed - ord("a") + 10 if signed >= ord("a") else signed - ord("0")
