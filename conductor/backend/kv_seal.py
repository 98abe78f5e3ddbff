"""What a saved KV must agree in before llama.cpp may see it again: who made it, in what layout, and every byte.

llama.cpp trusts the bytes that it restores: those of another model, or a flipped one, are wrong answers at best. Covers
the label, the checksum and their comparison; the places are in `kv_arena` and `kv_disk`. The only import of xxhash.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray
    from conductor.types import ModelId

#: One thread hashes several times slower than a GPU's link copies, eight about as fast, more gain little.
_THREADS = min(8, os.cpu_count() or 1)
#: below it starting the threads eats what they gain
_PARALLEL_BYTES = 32 << 20
#: the threads' bookkeeping costs nothing beside it
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Label:
    """What a blob must agree in before llama.cpp may see it."""

    model_id: ModelId
    kv_type: str
    flash_attention: bool  #: decides whether V is stored transposed
    slots: int  #: of the context it was saved from
    tokens: int  #: how many tokens of the session the KV holds


class DamagedBlob(Exception):
    """The saved KV must not be used: its label or its checksum disagrees, or its file cannot be read."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Seal:
    """Taken when a blob is written, compared when it is read."""

    label: Label
    bytes: int
    checksum: int
    parts: tuple[tuple[int, int], ...]  #: (start, end) of what it is about; what lies outside is nobody's

    @classmethod
    def of(
        cls,
        label: Label,
        payload: ByteArray,
        parts: tuple[tuple[int, int], ...] | None = None,
        *,
        helpers: Executor | None = None,
        between: Callable[[], None] | None = None,
    ) -> Seal:
        """`parts`: None for all of it. `helpers`, `between`: as `checksum` has them."""
        parts = ((0, payload.nbytes),) if parts is None else parts
        return cls(label, payload.nbytes, checksum(*_cut(payload, parts), helpers=helpers, between=between), parts)

    def require_label(self, label: Label) -> None:
        """Raises DamagedBlob."""
        names = [field.name for field in dataclasses.fields(label)]
        wrong = [f"{name} {getattr(self.label, name)!r} is not {getattr(label, name)!r}" for name in names
                 if getattr(self.label, name) != getattr(label, name)]  # fmt: skip
        if wrong:
            raise DamagedBlob(f"it was saved for something else: {', '.join(wrong)}")

    def require_payload(self, payload: ByteArray, *, helpers: Executor | None = None) -> None:
        """Raises DamagedBlob."""
        if payload.nbytes != self.bytes or checksum(*_cut(payload, self.parts), helpers=helpers) != self.checksum:
            raise DamagedBlob("its checksum does not match")


def _cut(payload: ByteArray, parts: tuple[tuple[int, int], ...]) -> list[ByteArray]:
    return [payload[start:end] for start, end in parts]


def start_helpers(purpose: str) -> ThreadPoolExecutor:
    """Threads for `checksum`, which stay: starting them for each would hold up whoever the bytes are for."""
    return ThreadPoolExecutor(max(1, _THREADS - 1), thread_name_prefix=purpose)


def checksum(*payloads: ByteArray, helpers: Executor | None = None, between: Callable[[], None] | None = None) -> int:
    """xxh3_64 over the xxh3_64 of each chunk, so that threads can share the work.

    `helpers` take part where there is much of it. `between`: called before each chunk, in any of them, and may wait.

    `update` of an object made empty is the call that gives up the interpreter lock in every xxhash since 3.0; the one-line
    functions do so since 4.0 only. So no other thread of Python waits for a hash.
    """
    chunks = [chunk for payload in payloads for chunk in _chunks(payload)]
    digests = [b""] * len(chunks)
    places = itertools.count()  # `next` of it is one step, whichever thread takes it

    def work() -> None:
        while (place := next(places)) < len(chunks):
            if between is not None:
                between()
            digests[place] = _digest(chunks[place])

    others = []
    if helpers is not None and sum(payload.nbytes for payload in payloads) >= _PARALLEL_BYTES:
        others = [helpers.submit(work) for _ in range(_THREADS - 1)]
    try:
        work()
    finally:
        wait(others)  # whatever happens, nobody looks at the bytes afterwards
    for other in others:
        other.result()
    return xxhash.xxh3_64_intdigest(b"".join(digests))


def _chunks(payload: ByteArray) -> Iterator[ByteArray]:
    return (payload[start : start + _CHUNK_BYTES] for start in range(0, payload.nbytes, _CHUNK_BYTES))


def _digest(chunk: ByteArray) -> bytes:
    digest = xxhash.xxh3_64()
    digest.update(chunk.data)
    return digest.digest()
