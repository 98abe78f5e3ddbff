"""What a model says of itself, wrong: sizes, fractions, switches, and keys that are missing, doubled or of another type."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from tests.support.anatomy import ARRAY, BOOL, F32, I32, SCALARS, STRING, U32, Anatomy, pack
from tests.support.mutations import Edit, pick

U16, U32_MAX = 2, 2**32 - 1
SIZES = (0, 1, 2, 3, 513, 2**16, 2**31 - 1, 2**31, U32_MAX)
FRACTIONS = (math.nan, -1.0, 0.0, math.inf, -math.inf, 1e-45, 3e38, -0.0, 1e-6)


def sizes(*names: str, values: Sequence[int] = SIZES) -> Edit:
    def edit(anatomy: Anatomy, _: random.Random, number: int) -> str:
        name, value = pick(names, number), pick(values, number // len(names))
        anatomy.put(f"{anatomy.architecture}.{name}", U32, value)
        return f"{name} = {value}"

    return edit


def fractions(*names: str) -> Edit:
    def edit(anatomy: Anatomy, _: random.Random, number: int) -> str:
        name, value = pick(names, number), pick(FRACTIONS, number // len(names))
        anatomy.put(f"{anatomy.architecture}.{name}", F32, value)
        return f"{name} = {value}"

    return edit


def switches(anatomy: Anatomy, _: random.Random, number: int) -> str:
    a = anatomy.architecture
    cases: list[tuple[str, int, object]] = [
        (f"{a}.attention.causal", BOOL, False),
        (f"{a}.use_parallel_residual", BOOL, True),
        (f"{a}.swin_norm", BOOL, True),
        (f"{a}.rope.scaling.type", STRING, b"yarn"),
        (f"{a}.rope.scaling.type", STRING, b"longrope"),
        (f"{a}.rope.scaling.type", STRING, b"nonsense"),
        (f"{a}.rope.scaling.type", STRING, b"none"),
        (f"{a}.rope.scaling.finetuned", BOOL, True),
        ("general.type", STRING, b"adapter"),
        ("general.type", STRING, b"mmproj"),
        ("split.count", U16, 4),
        ("split.no", U16, 3),
        ("split.tensors.count", I32, -5),
        (f"{a}.rope.dimension_sections", ARRAY, (I32, [1, 2, 3, 4])),
        (f"{a}.rope.dimension_sections", ARRAY, (I32, [0] * 4)),
        (f"{a}.attention.head_count", ARRAY, (U32, [2, 0])),
        (f"{a}.attention.head_count", ARRAY, (U32, [])),
        (f"{a}.attention.head_count_kv", ARRAY, (U32, [1, 0])),
        (f"{a}.attention.head_count_kv", ARRAY, (U32, [0, 1])),
        (f"{a}.feed_forward_length", ARRAY, (U32, [32, 0])),
        (f"{a}.feed_forward_length", ARRAY, (U32, [32] * 600)),
        (f"{a}.attention.sliding_window_pattern", ARRAY, (BOOL, [True, False])),
        (f"{a}.attention.indexer.types", ARRAY, (I32, [1] * 9)),
        (f"{a}.decoder_start_token_id", U32, 2**31),
        ("adapter.type", STRING, b"lora"),
        ("general.file_type", U32, 2**31),
        ("general.name", STRING, b"phi-3"),  # llama.cpp looks for tokens of that family
        ("general.name", STRING, b"\xff\xfe\x00\x1b[2J"),
        ("general.sampling.top_k", I32, -9),
        ("general.quantization_version", U32, 99),
    ]
    key, type_id, value = pick(cases, number)
    anatomy.put(key, type_id, value)
    return f"{key} = {value!r}"


def another_type(anatomy: Anatomy, chance: random.Random, _: int) -> str:
    entry = chance.choice(anatomy.entries)
    type_id = chance.choice([type_id for type_id in (*SCALARS, STRING, ARRAY) if type_id != entry.type_id])
    a_text, a_list = chance.choice((b"7", b"", b"llama")), chance.choice(((U32, [2, 2]), (STRING, [b"x"])))
    entry.type_id, entry.raw = type_id, pack(type_id, {STRING: a_text, ARRAY: a_list}.get(type_id, 1))
    return f"{entry.key.decode()} as type {type_id}"


def missing(anatomy: Anatomy, _: random.Random, number: int) -> str:
    return anatomy.entries.pop(number % len(anatomy.entries)).key.decode()


def twice(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    entry = pick(anatomy.entries, number)
    anatomy.entries.insert(chance.randrange(len(anatomy.entries)), entry)
    return entry.key.decode()


def names(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    entry = chance.choice(anatomy.entries)
    was, entry.key = entry.key, pick((b"", b"\xff\xfe", b"a" * 70_000, b"nul\x00inside", b"%s%n%d"), number)
    return f"{was.decode()} is {entry.key[:20]!r}"


#: llama.cpp knows some 140; these are near to the mutants' own, or of another sort
ARCHITECTURES = (
    "bert", "t5", "clip", "gemma2", "gemma3", "gpt2", "qwen3", "phi3", "mamba2", "rwkv6", "rwkv7", "jamba", "falcon-h1",
    "cohere2", "deepseek2", "olmo2", "granite", "llama4", "gemma-embedding", "llama-embed", "wavtokenizer-dec", "lfm2",
    "minicpm", "mistral3", "smollm3", "nonsense", "", "llada", "dream", "plamo2", "starcoder2", "stablelm", "exaone4",
    "t5encoder", "arcee", "gemma3n", "nomic-bert", "qwen2", "llama", "mamba", "talkie", "hrm_text", "cogvlm", "evil\x1b[2J",
)  # fmt: skip


def architecture(anatomy: Anatomy, _: random.Random, number: int) -> str:
    was, now = anatomy.architecture, pick(ARCHITECTURES, number)
    anatomy.put("general.architecture", STRING, now.encode())
    for entry in anatomy.entries:
        if entry.key.startswith(was.encode() + b"."):
            entry.key = now.encode() + entry.key[len(was) :]
    anatomy.put(f"{now}.attention.layer_norm_epsilon", F32, 1e-5)
    return f"now {now!r}"


EDITS: dict[str, Edit] = {
    "layers": sizes("block_count", values=(0, 513, 2**31, 1, 3, 512, 2**16, 2**31 - 1, U32_MAX)),
    "heads": sizes("attention.head_count", "attention.head_count_kv"),
    "widths": sizes("embedding_length", "feed_forward_length", "attention.key_length", "attention.value_length"),
    "trained window": sizes("context_length"),
    "rotation": sizes(
        "rope.dimension_count", "rope.dimension_count_swa", "rope.scaling.original_context_length", "attention.sliding_window",
        "attention.sliding_window_pattern", "vocab_size",
    ),
    "recurrent sizes": sizes(
        "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count", "wkv.head_size",
        "token_shift_count", "shortconv.l_cache", "full_attention_interval",
    ),
    "sizes that others have": sizes(
        "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count", "expert_feed_forward_length",
        "expert_shared_feed_forward_length", "nextn_predict_layers", "pooling_type", "embedding_length_out",
        "leading_dense_block_count", "n_deepstack_layers", "decoder_block_count", "attention.key_length_swa",
        "attention.value_length_swa", "attention.shared_kv_layers", "expert_gating_func", "interleave_moe_layer_step",
        "classifier.pooling_type", "embedding_length_per_layer_input", values=(1, 0, 2, 4, U32_MAX),
    ),
    "epsilon": fractions("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.group_norm_epsilon"),
    "rope base": fractions("rope.freq_base", "rope.scaling.factor", "rope.scale_linear", "rope.freq_base_swa"),
    "fractions that others have": fractions(
        "attn_logit_softcapping", "final_logit_softcapping", "attention.scale", "logit_scale", "residual_scale",
        "embedding_scale", "attention.clamp_kqv", "attention.max_alibi_bias", "rope.scaling.attn_factor",
        "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_attn_factor", "rope.scaling.alpha",
    ),
    "switches": switches,
    "values of another type": another_type,
    "keys missing": missing,
    "keys twice": twice,
    "names of keys": names,
    "another architecture": architecture,
}  # fmt: skip
