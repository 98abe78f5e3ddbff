"""Saved KV of agents that are not live: in the arena of host memory, beyond it in files, each blob sealed when it is written.

Who goes where is decided by the core; here it is carried out, and the budgets are kept. Every method may be called from any
thread. A blob that is freed while somebody reads or moves it keeps its place until that one is done; nobody waits for it.
See also: `kv_arena` and `kv_disk` for the places, `kv_seal` for labels and checksums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from conductor.backend.kv_arena import KvArena, Span
from conductor.backend.kv_disk import KvDisk, KvFile
from conductor.backend.kv_seal import DamagedBlob, Label, Seal
from conductor.errors import InternalError
from conductor.types import KvPlace

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray

__all__ = ["Blob", "DamagedBlob", "KvStore", "Label"]

T = TypeVar("T")

#: What a move to disk writes before it lets a compaction pass: a slow disk must not hold up saves and restores.
_PIECE_BYTES = 16 << 20


@dataclass(slots=True, eq=False)
class Blob:
    """A saved KV; give it back with `free`."""

    seal: Seal
    at: Span | KvFile = field(repr=False)  #: the store's own

    @property
    def bytes(self) -> int:
        return self.seal.bytes

    @property
    def label(self) -> Label:
        return self.seal.label

    @property
    def place(self) -> KvPlace:
        return KvPlace.HOST if isinstance(self.at, Span) else KvPlace.DISK


class KvStore:
    def __init__(self, arena: ByteArray, *, pinned: bool, disk: KvDisk | None = None) -> None:
        self.pinned = pinned
        self._arena = KvArena(arena)
        self._disk = disk
        self._blobs: set[Blob] = set()
        self._lock = threading.Lock()  # which blobs there are and where each is; held for moments

    @property
    def budget_bytes(self) -> int:
        return self._arena.budget_bytes

    @property
    def used_bytes(self) -> int:
        return self._arena.used_bytes

    @property
    def disk_budget_bytes(self) -> int:
        return self._disk.budget_bytes if self._disk else 0

    @property
    def disk_used_bytes(self) -> int:
        return self._disk.used_bytes if self._disk else 0

    def write(self, bytes: int, label: Label, fill: Callable[[ByteArray], None], *, to: KvPlace = KvPlace.HOST) -> Blob | None:
        """Take a place, let `fill` copy the KV into it, seal it. None if there is no place, or nothing to keep.

        What `fill` raises passes on, the place freed. It may not keep the array, nor write or read other blobs meanwhile.
        """
        if bytes < 1:
            return None
        if to is KvPlace.HOST:
            return self._write_to_host(bytes, label, fill)
        return self._write_to_disk(bytes, label, fill) if self._disk else None

    def read(self, blob: Blob, label: Label, use: Callable[[ByteArray], T]) -> T:
        """What `use` makes of the bytes, which are those that `fill` left. The blob stays.

        Raises DamagedBlob, `use` not called, if label or checksum disagree or the file cannot be read. `use` may not change or
        keep the array, nor write or read other blobs meanwhile.
        """
        blob.seal.require_label(label)
        with self._open(blob) as payload:
            blob.seal.require_payload(payload)
            payload.flags.writeable = False
            return use(payload)

    def to_disk(self, blob: Blob) -> bool:
        """Move the blob to a file and free its place in the arena. False, the blob as it was, if the disk does not take it."""
        with self._lock:
            self._require(blob)
            span = blob.at
            if isinstance(span, KvFile):
                return True
            file = self._disk.take(blob.bytes) if self._disk else None
            if file is None:
                return False
            self._arena.hold(span)
        with ExitStack() as undo:
            undo.callback(self._arena.drop, span)
            unused = undo.enter_context(ExitStack())
            unused.callback(self._files.release, file)
            with closing(self._pieces(span)) as pieces:
                if not self._files.save(file, blob.seal, pieces):
                    return False
            with self._lock:
                if blob not in self._blobs or blob.at is not span:
                    return False  # freed meanwhile
                blob.at = file
            unused.pop_all()
        self._arena.drop(span)
        return True

    def free(self, blob: Blob) -> None:
        """Forget the blob and free its place. Waits for nobody: a reader keeps the place until it is done."""
        with self._lock:
            self._require(blob)
            self._blobs.remove(blob)
            at = blob.at
        if isinstance(at, Span):
            self._arena.drop(at)
        else:
            self._files.release(at)

    def close(self) -> None:
        """Delete the own files."""
        if self._disk:
            self._disk.close()

    def check(self) -> None:
        """Raise InternalError unless every blob has a place of its own and size, and the places keep to their budgets."""
        self._arena.check()
        if self._disk:
            self._disk.check()
        with self._lock:
            places = [blob.at for blob in self._blobs]
            if len(set(places)) < len(places) or any(blob.at.bytes != blob.bytes for blob in self._blobs):
                raise InternalError("two saved KVs share a place, or one has a place of another size")
            host = sum(at.bytes for at in places if isinstance(at, Span))
            disk = sum(at.bytes for at in places if isinstance(at, KvFile))
            if host > self.used_bytes or disk > self.disk_used_bytes:
                raise InternalError(f"saved KVs take {host} + {disk} bytes, booked {self.used_bytes} + {self.disk_used_bytes}")

    def _write_to_host(self, bytes: int, label: Label, fill: Callable[[ByteArray], None]) -> Blob | None:
        span = self._arena.take(bytes)
        if span is None:
            return None
        with ExitStack() as undo:
            undo.callback(self._arena.drop, span)
            with self._arena.open(span) as payload:
                fill(payload)
                seal = Seal.of(label, payload)
            undo.pop_all()
        return self._entered(Blob(seal, span))

    def _write_to_disk(self, bytes: int, label: Label, fill: Callable[[ByteArray], None]) -> Blob | None:
        file = self._files.take(bytes)
        if file is None:
            return None
        with ExitStack() as undo:
            undo.callback(self._files.release, file)
            try:
                payload = np.empty(bytes, np.uint8)
            except MemoryError:
                return None
            fill(payload)
            seal = Seal.of(label, payload)
            if not self._files.save(file, seal, [payload]):
                return None
            undo.pop_all()
        return self._entered(Blob(seal, file))

    def _entered(self, blob: Blob) -> Blob:
        with self._lock:
            self._blobs.add(blob)
        return blob

    @contextmanager
    def _open(self, blob: Blob) -> Iterator[ByteArray]:
        with self._lock:
            self._require(blob)
            at = blob.at
            if isinstance(at, Span):
                self._arena.hold(at)
        if isinstance(at, KvFile):
            yield self._files.read(at, blob.seal)
            return
        try:
            with self._arena.open(at) as payload:
                yield payload
        finally:
            self._arena.drop(at)

    def _pieces(self, span: Span) -> Generator[ByteArray, None, None]:
        for start in range(0, span.bytes, _PIECE_BYTES):
            with self._arena.open(span) as payload:
                yield payload[start : start + _PIECE_BYTES]

    @property
    def _files(self) -> KvDisk:
        if self._disk is None:
            raise InternalError("a saved KV on disk, and there is no disk")
        return self._disk

    def _require(self, blob: Blob) -> None:
        if blob not in self._blobs:
            raise InternalError(f"a saved KV of {blob.bytes} bytes that is not here, or was freed")
