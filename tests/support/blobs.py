"""Saving KV without a model: contents by number, and a disk during whose writing something happens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from conductor.backend.kv_disk import KvDisk, KvFile
from conductor.backend.kv_seal import Seal
from conductor.backend.kv_store import Blob, KvStore, Label
from conductor.types import KvPlace, ModelId

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray

BUDGET, DISK_BUDGET = 1000, 600
LABEL = Label(ModelId("coder"), kv_type="f16", flash_attention=True, slots=1, tokens=7)


def store_on(disk: KvDisk | None = None, *, budget: int = BUDGET) -> KvStore:
    return KvStore(np.zeros(budget, np.uint8), pinned=False, disk=disk)


def content(bytes: int, seed: int) -> ByteArray:
    return np.frombuffer(random.Random(seed).randbytes(bytes), np.uint8)


def save(store: KvStore, bytes: int, seed: int = 0, *, to: KvPlace = KvPlace.HOST) -> Blob | None:
    return store.write(bytes, LABEL, lambda place: np.copyto(place, content(bytes, seed)), to=to)


def saved(store: KvStore, bytes: int, seed: int = 0, *, to: KvPlace = KvPlace.HOST) -> Blob:
    blob = save(store, bytes, seed, to=to)
    assert blob is not None
    assert (blob.bytes, blob.place, blob.label) == (bytes, to, LABEL)
    return blob


def reads_back(store: KvStore, blob: Blob, seed: int) -> bool:
    return store.read(blob, LABEL, lambda place: place.tobytes()) == content(blob.bytes, seed).tobytes()


def forbidden(_: ByteArray) -> None:
    raise AssertionError("damaged bytes reached llama.cpp")


class BusyDisk(KvDisk):
    """Something happens while it writes: before the second piece is asked for."""

    meanwhile: Callable[[], object]

    def save(self, file: KvFile, seal: Seal, pieces: Iterable[ByteArray]) -> bool:
        return super().save(file, seal, self._watched(pieces))

    def _watched(self, pieces: Iterable[ByteArray]) -> Iterator[ByteArray]:
        for n, piece in enumerate(pieces):
            yield piece
            if n == 0:
                self.meanwhile()
