"""Small GGUF files with random weights that llama.cpp loads, tokenises with and decodes: real format, no meaning.

Covers llama, qwen2, gemma3 (sliding window), mamba (recurrent) and jamba (every other layer recurrent), one byte-level BPE
vocabulary for all, so any UTF-8 text has tokens. `hollow=True` leaves the tensor data a hole in the file: a true geometry
of any size in a few megabytes of disk, good for headers and dry runs, not for decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import TokenType

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, END_OF_TURN = 256, 258
WORDS = ("the", "and", "hello", "world", "agent", "model")
FILE_TYPES = {"f32": (TensorType.F32, gguf.LlamaFileType.ALL_F32), "q8_0": (TensorType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0)}
MAMBA_CONV, MAMBA_STATE = 4, 16
EXPERTS_USED = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that tensors are made of."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    n_ff: int
    n_vocab: int
    head_dim: int
    tied: bool
    n_expert: int = 0

    @property
    def mamba(self) -> bool:
        return self.architecture == "mamba"

    @property
    def recurrent(self) -> bool:
        return self.architecture in ("mamba", "jamba")

    def attends(self, layer: int) -> bool:
        return layer % 2 == 1 if self.architecture == "jamba" else not self.mamba


def write_tiny_gguf(
    path: str | Path,
    *,
    architecture: str = "llama",
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 4,
    n_kv_head: int = 2,
    n_ff: int = 128,
    n_vocab: int = 300,
    head_dim: int | None = None,
    trained_window: int = 4096,
    sliding_window: int = 256,
    tied: bool = False,
    seed: int = 0,
    chat_template: str | None = CHATML,
    file_type: str = "f32",
    hollow: bool = False,
    n_expert: int = 0,
) -> Path:
    """Write the file and return its path. The same arguments give the same bytes. gemma3 and mamba are always tied.

    `n_expert`: of a llama, experts in each layer, two of which a token passes through.
    """
    tied = tied or architecture in ("gemma3", "mamba")
    head_dim = head_dim or n_embd // n_head
    shape = Shape(architecture, n_layer, n_embd, n_head, n_kv_head, n_ff, n_vocab, head_dim, tied, n_expert)
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, shape, trained_window=trained_window, sliding_window=sliding_window)
    _add_vocabulary(writer, n_vocab)
    writer.add_file_type(FILE_TYPES[file_type][1])
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    if hollow:
        _write_hollow(writer, shape, FILE_TYPES[file_type][0])
    else:
        _write_random(writer, shape, FILE_TYPES[file_type][0], np.random.default_rng(seed))
    writer.close()
    return Path(path)


def _add_sizes(writer: gguf.GGUFWriter, shape: Shape, *, trained_window: int, sliding_window: int) -> None:
    writer.add_name(f"tiny {shape.architecture}")
    writer.add_context_length(trained_window)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.recurrent:
        writer.add_ssm_conv_kernel(MAMBA_CONV)
        writer.add_ssm_inner_size(2 * shape.n_embd)
        writer.add_ssm_state_size(MAMBA_STATE)
        writer.add_ssm_time_step_rank(_mamba_rank(shape))
    if shape.mamba:
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        return
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    kv_heads = [shape.n_kv_head if shape.attends(layer) else 0 for layer in range(shape.n_layer)]
    writer.add_head_count_kv(kv_heads if shape.recurrent else shape.n_kv_head)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(EXPERTS_USED)
    if shape.architecture == "gemma3":
        writer.add_sliding_window(sliding_window)


def _add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """256 byte tokens, the ChatML control tokens, the beginnings of a few words, and fillers."""
    tokens = [*_byte_characters(), *CONTROL_TOKENS]
    types = [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * len(CONTROL_TOKENS)
    merges = []
    for word in WORDS:
        for end in range(1, len(word)):
            if len(tokens) < n_vocab and word[: end + 1] not in tokens:
                merges.append(f"{word[:end]} {word[end]}")
                tokens.append(word[: end + 1])
    if not merges:
        raise ValueError(f"n_vocab must be at least {len(types) + 1}")
    tokens += [f"filler{i}" for i in range(len(tokens), n_vocab)]
    types += [TokenType.NORMAL] * (n_vocab - len(types))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(END_OF_TEXT)
    writer.add_eos_token_id(END_OF_TEXT)
    writer.add_eot_token_id(END_OF_TURN)
    writer.add_add_bos_token(False)


def _byte_characters() -> list[str]:
    """The visible character that stands for each byte in GPT-2's vocabulary: itself, or the next one after U+00FF."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def _mamba_rank(shape: Shape) -> int:
    return math.ceil(shape.n_embd / 16)


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and dimensions, rows first as numpy has them."""
    yield "token_embd.weight", (shape.n_vocab, shape.n_embd)
    yield "output_norm.weight", (shape.n_embd,)
    if not shape.tied:
        yield "output.weight", (shape.n_vocab, shape.n_embd)
    for layer in range(shape.n_layer):
        parts = [*(_attention_layer(shape) if shape.attends(layer) else _mamba_layer(shape))]
        if not shape.mamba:
            parts += _feed_forward(shape)
        for name, dims in parts:
            yield f"blk.{layer}.{name}", dims


def _attention_layer(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    n_embd = shape.n_embd
    widths = {"q": shape.n_head * shape.head_dim, "k": shape.n_kv_head * shape.head_dim, "v": shape.n_kv_head * shape.head_dim}
    yield "attn_norm.weight", (n_embd,)
    for part, width in widths.items():
        yield f"attn_{part}.weight", (width, n_embd)
        if shape.architecture == "qwen2":
            yield f"attn_{part}.bias", (width,)
    yield "attn_output.weight", (n_embd, widths["q"])
    if shape.architecture == "gemma3":
        yield "attn_q_norm.weight", (shape.head_dim,)
        yield "attn_k_norm.weight", (shape.head_dim,)
        yield "post_attention_norm.weight", (n_embd,)
        yield "post_ffw_norm.weight", (n_embd,)


def _feed_forward(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "ffn_norm.weight", (shape.n_embd,)
    if n := shape.n_expert:
        yield "ffn_gate_inp.weight", (n, shape.n_embd)
        yield "ffn_gate_exps.weight", (n, shape.n_ff, shape.n_embd)
        yield "ffn_up_exps.weight", (n, shape.n_ff, shape.n_embd)
        yield "ffn_down_exps.weight", (n, shape.n_embd, shape.n_ff)
        return
    yield "ffn_gate.weight", (shape.n_ff, shape.n_embd)
    yield "ffn_up.weight", (shape.n_ff, shape.n_embd)
    yield "ffn_down.weight", (shape.n_embd, shape.n_ff)


def _mamba_layer(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    n_embd, n_inner, rank = shape.n_embd, 2 * shape.n_embd, _mamba_rank(shape)
    yield "attn_norm.weight", (n_embd,)
    yield "ssm_in.weight", (2 * n_inner, n_embd)
    yield "ssm_conv1d.weight", (n_inner, MAMBA_CONV)
    yield "ssm_conv1d.bias", (n_inner,)
    yield "ssm_x.weight", (rank + 2 * MAMBA_STATE, n_inner)
    if not shape.mamba:
        yield "ssm_dt_norm.weight", (rank,)
        yield "ssm_b_norm.weight", (MAMBA_STATE,)
        yield "ssm_c_norm.weight", (MAMBA_STATE,)
    yield "ssm_dt.weight", (n_inner, rank)
    yield "ssm_dt.bias", (n_inner,)
    yield "ssm_a", (n_inner, MAMBA_STATE)
    yield "ssm_d", (n_inner,)
    yield "ssm_out.weight", (n_embd, n_inner)


def _stored_type(name: str, dims: tuple[int, ...], wanted: TensorType) -> TensorType:
    """Only matrices with whole blocks are quantised, and of mamba's only the large ones."""
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    small = len(dims) == 1 or dims[-1] % block or any(part in name for part in ("ssm_conv1d", "ssm_dt", "ssm_a"))
    return TensorType.F32 if small else wanted


def _write_random(writer: gguf.GGUFWriter, shape: Shape, wanted: TensorType, rng: np.random.Generator) -> None:
    for name, dims in _tensors(shape):
        values = rng.normal(0, 1 / math.sqrt(dims[-1]), dims).astype(np.float32)
        if name.endswith("norm.weight"):
            values = np.ones(dims, np.float32)
        elif name.endswith("ssm_a"):
            values = -np.exp(values)  # a decay: must be negative
        stored = _stored_type(name, dims, wanted)
        writer.add_tensor(name, values if stored is TensorType.F32 else gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def _write_hollow(writer: gguf.GGUFWriter, shape: Shape, wanted: TensorType) -> None:
    for name, dims in _tensors(shape):
        stored = _stored_type(name, dims, wanted)
        block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        row_bytes = dims[-1] // block * block_bytes
        is_float = stored is TensorType.F32
        writer.add_tensor_info(
            name,
            dims if is_float else (*dims[:-1], row_bytes),  # the writer wants bytes for quantised rows
            np.dtype(np.float32 if is_float else np.uint8),
            math.prod(dims[:-1]) * row_bytes,
            raw_dtype=None if is_float else stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    data_bytes = sum(writer.ggml_pad(tensor.nbytes, writer.data_alignment) for tensor in writer.tensors[0].values())
    file.truncate(writer.ggml_pad(file.tell(), writer.data_alignment) + data_bytes)
