"""Wrong vocabularies, tokenizers and chat templates."""

from __future__ import annotations

import math
import random
import struct

from tests.support.anatomy import ARRAY, BOOL, F32, I32, STRING, U32, Anatomy
from tests.support.mutations import Edit, pick

I8 = 1
U32_MAX = 2**32 - 1


def tokens(anatomy: Anatomy) -> list[bytes]:
    raw = anatomy.get("tokenizer.ggml.tokens").raw
    found, position = [], 12
    while position < len(raw):
        [length] = struct.unpack_from("<Q", raw, position)
        found.append(raw[position + 8 : position + 8 + length])
        position += 8 + length
    return found


def put_list(anatomy: Anatomy, name: str, type_id: int, values: object) -> None:
    anatomy.put(f"tokenizer.ggml.{name}", ARRAY, (type_id, values))


def vocabulary_length(anatomy: Anatomy, _: random.Random, number: int) -> str:
    known = tokens(anatomy)
    more = [*known, *(b"more%d" % i for i in range(4 * len(known)))]
    count = pick((0, 1, 11, len(known) - 1, len(known) + 1, 4 * len(known)), number)
    put_list(anatomy, "tokens", STRING, more[:count])
    if number % 12 > 5:
        anatomy.put(f"{anatomy.architecture}.vocab_size", U32, count)
    return f"{count} tokens"


def token_texts(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    known = tokens(anatomy)
    which = chance.randrange(1, len(known))
    known[which] = pick(
        (b"", b"a" * 200_000, b"\xff\xfe\xfd", known[which - 1], b"\x00", b"<0x41>", "\u0120".encode() * 9), number
    )
    if number % 14 > 6:
        known = [b"%d" % i if chance.random() < 0.5 else text for i, text in enumerate(known)]
    put_list(anatomy, "tokens", STRING, known)
    return f"token {which} = {known[which][:20]!r}"


def token_kinds(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    n = len(tokens(anatomy))
    cases = [
        *([kind] * n for kind in (6, 0, 2, 3, 4, 5)),
        [chance.randrange(-9, 99) for _ in range(n)],
        [1] * (n - 1),
        [1] * (n + 1),
        [chance.choice((1, 2, 3, 4, 5, 6)) for _ in range(n)],
    ]
    put_list(anatomy, "token_type", I32, pick(cases, number))
    return f"{pick(cases, number)[:4]}…"


def merges_and_scores(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    n = len(tokens(anatomy))
    cases: list[tuple[str, int, list[bytes] | list[int] | list[float]]] = [
        ("merges", STRING, []),
        ("merges", STRING, [b"", b" ", b"  ", b"a", b" a", b"a "]),
        ("merges", U32, [1]),
        ("merges", STRING, [chance.randbytes(9) for _ in range(40)]),
        ("merges", STRING, [b"t h"] * 500),
        ("scores", F32, [math.nan] * n),
        ("scores", F32, [math.inf] * n),
        ("scores", F32, [0.0] * (n - 1)),
        ("scores", U32, [1] * n),
        ("scores", I32, [-1] * n),
        ("precompiled_charsmap", I8, [-1] * 64),
        ("precompiled_charsmap", I8, []),
        ("suppress_tokens", I32, [-1, 2**31 - 1, 5]),
        ("suppress_tokens", I32, list(range(n))),
    ]
    name, type_id, values = pick(cases, number)
    put_list(anatomy, name, type_id, values)
    return f"{name} {values[:3]}… of type {type_id}"


SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pre", "fim_pad", "prefix")


def special_tokens(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    name, value = pick(SPECIAL, number), chance.choice((288, 289, 2**16, 2**31 - 1, 2**31, U32_MAX, 0))
    anatomy.put(f"tokenizer.ggml.{name}_token_id", U32, value)
    adds = [word for word in ("bos", "eos", "sep") if chance.random() < 0.5]
    for word in adds:
        anatomy.put(f"tokenizer.ggml.add_{word}_token", BOOL, True)
    if chance.random() < 0.3:
        anatomy.entries = [entry for entry in anatomy.entries if not entry.key.endswith(b"_token_id")]
    return f"{name} = {value}, adds {adds}"


TOKENIZERS = (
    "none", "llama", "bert", "t5", "rwkv", "plamo2", "gemma4", "gpt2", "hybriddna", "whitespace", "no_vocab", "test", "nonsense",
    "",
)  # fmt: skip
PRE = (
    "default", "llama-bpe", "deepseek-llm", "falcon", "mpt", "gpt-2", "jina-es", "gemma4", "sarvam-moe", "whitespace", "refact",
    "command-r", "qwen35", "tekken", "smollm", "bloom", "exaone", "exaone-moe", "chameleon", "gpt-4o", "kimi-k2", "bailingmoe",
    "chatglm-bpe", "viking", "modern-bert", "superbpe", "minicpm5", "nonsense", "", "llama-v3", "jina-v2-code", "tiny_aya",
)  # fmt: skip


def tokenizer(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    anatomy.put("tokenizer.ggml.model", STRING, pick(TOKENIZERS, number).encode())
    if chance.random() < 0.3:
        put_list(anatomy, "precompiled_charsmap", 0, list(struct.pack("<I", 16) + chance.randbytes(40)))
    if chance.random() < 0.3:
        anatomy.put("tokenizer.ggml.add_bos_token", BOOL, True)
    return f"now {pick(TOKENIZERS, number)!r}"


def pre_tokenizer(anatomy: Anatomy, chance: random.Random, number: int) -> str:
    anatomy.put("tokenizer.ggml.pre", STRING, pick(PRE, number).encode())
    if chance.random() < 0.3:
        anatomy.put("tokenizer.ggml.model", STRING, chance.choice(TOKENIZERS[:10]).encode())
    return f"now {pick(PRE, number)!r}"


TEMPLATES = (
    # time
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9**(9**9) }}",
    "{{ 7 ** (10 ** 7) }}",
    # memory
    "{{ 'x' * 20000000000 }}",
    "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ messages|map(attribute='content')|join('x')|center(10**10) }}",
    "{{ 'a' | replace('a', 'b' * 999999) * 99999 }}",
    "{{ range(10**12)|list }}",
    # the stack
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ (" * 300,
    "{{" + "(" * 3000 + ")" * 3000 + "}}",
    "{% if true %}" * 500 + "x" + "{% endif %}" * 500,
    # the way out
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    # mistakes
    "{% for m in messages %}{{ m['content'] }",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ strftime_now('%' * 100000) }}",
    "{% for i in range(3) %}{{ loop }}{% endfor %}",
    "",
    "no messages at all",
    "\x00\ufffe",
    "x" * 3_000_000,
)


def template(anatomy: Anatomy, _: random.Random, number: int) -> str:
    source = pick(TEMPLATES, number)
    anatomy.put("tokenizer.chat_template", STRING, source.encode())
    return repr(source[:60])


EDITS: dict[str, Edit] = {
    "length of the vocabulary": vocabulary_length,
    "texts of tokens": token_texts,
    "kinds of tokens": token_kinds,
    "merges and scores": merges_and_scores,
    "special tokens": special_tokens,
    "another tokenizer": tokenizer,
    "another pre-tokenizer": pre_tokenizer,
    "chat templates": template,
}
