"""Hostile files: mutants of small valid models, the same for the same seed.

Nobody says here whether one is harmless. What all must end in: a typed error, or a model that works.
See also: `anatomy.py`, how a file is taken apart; `mutations`, what is done to it; `trial.py`, what a mutant is put through.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.anatomy import ARRAY, F32, I32, STRING, U32, Anatomy, take_apart
from tests.support.mutations import claims, container, files, pick, words
from tests.support.tiny_gguf import write_tiny_gguf

EDITS = container.EDITS | claims.EDITS | words.EDITS
ODD, LATER = "no file to speak of", "changed before the load"
KINDS = (*container.DAMAGES, *EDITS, ODD, LATER)


@dataclass(frozen=True, slots=True)
class Mutant:
    """`place` makes what the conductor is to take for a model; `later`, if any, is done to it after it was priced."""

    kind: str
    what: str
    place: Callable[[Path], object]
    later: Callable[[Path], object] | None = None


def mutants(count: int, *, seed: int = 0) -> Iterator[Mutant]:
    """The kinds in turn, each through its cases in turn, on one of the models by chance."""
    models = bases()
    for i in range(count):
        chance = random.Random(f"{seed}-{i}")
        yield _mutant(chance.choice(models).copy(), KINDS[i % len(KINDS)], chance, i // len(KINDS) + seed)


def _mutant(anatomy: Anatomy, kind: str, chance: random.Random, number: int) -> Mutant:
    base = anatomy.architecture
    if kind == ODD:
        what, place = pick(files.odd_files(anatomy), number)
        return Mutant(kind, f"{base}: {what}", place)
    if kind == LATER:
        what, later = pick(files.changes(anatomy, chance), number)
        return Mutant(kind, f"{base}: {what}", files.written(anatomy.written()), later)
    if kind in EDITS:
        what = EDITS[kind](anatomy, chance, number)
        return Mutant(kind, f"{base}: {what}", files.written(anatomy.written()))
    raw = bytearray(anatomy.written())
    what = container.DAMAGES[kind](raw, anatomy, chance, number)
    return Mutant(kind, f"{base}: {what}", files.written(bytes(raw)))


def bases() -> list[Anatomy]:
    """Small models of four architectures, and one with a SentencePiece vocabulary."""
    made = [_tiny(architecture) for architecture in ("llama", "qwen2", "gemma3", "mamba")]
    return [*made, sentencepiece(made[0].copy())]


def _tiny(architecture: str) -> Anatomy:
    with tempfile.TemporaryDirectory() as directory:
        path = write_tiny_gguf(
            Path(directory, "tiny.gguf"), architecture=architecture, n_layer=2, n_embd=32, n_head=2, n_kv_head=1, n_ff=32,
            n_vocab=288, trained_window=1024,
        )  # fmt: skip
        return take_apart(path.read_bytes())


def sentencepiece(anatomy: Anatomy) -> Anatomy:
    """The same model with a vocabulary of the other common sort: scores, byte tokens, and U+2581 for a space."""
    n_vocab = len(words.tokens(anatomy))
    known = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), "\u2581".encode(), b"t", b"h", b"th"]
    known += [b"word%d" % i for i in range(len(known), n_vocab)]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (n_vocab - 259)
    anatomy.entries = [entry for entry in anatomy.entries if not entry.key.startswith(b"tokenizer.ggml")]
    anatomy.put("tokenizer.ggml.model", STRING, b"llama")
    anatomy.put("tokenizer.ggml.tokens", ARRAY, (STRING, known))
    anatomy.put("tokenizer.ggml.token_type", ARRAY, (I32, kinds))
    anatomy.put("tokenizer.ggml.scores", ARRAY, (F32, [-float(i) for i in range(n_vocab)]))
    for i, name in enumerate(("unknown", "bos", "eos")):
        anatomy.put(f"tokenizer.ggml.{name}_token_id", U32, i)
    return anatomy
