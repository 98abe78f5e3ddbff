"""Saved KV of agents that are not live: in the arena of host memory, beyond it in files, each blob sealed when it is written.

A large blob in host memory is sealed in another thread, while whoever wrote it goes on; what needs the seal waits for it.
Who goes where is decided by the core; here it is carried out, and the budgets are kept. Every method may be called from any
thread. A blob that is freed while somebody reads or moves it keeps its place until that one is done; nobody waits for it.
See also: `kv_arena` and `kv_disk` for the places, `kv_seal` for labels and checksums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from conductor.backend.kv_arena import KvArena, Span
from conductor.backend.kv_disk import KvDisk, KvFile
from conductor.backend.kv_seal import DamagedBlob, Label, Seal, start_helpers
from conductor.backend.precedence import Precedence
from conductor.errors import InternalError
from conductor.types import KvPlace

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray, Form

__all__ = ["Blob", "DamagedBlob", "KvStore", "Label"]

T = TypeVar("T")

#: What a move to disk writes before it lets a compaction pass: a slow disk must not hold up saves and restores.
_PIECE_BYTES = 16 << 20

#: what is smaller is sealed and checked sooner than a thread would have begun with it
_WORTH_A_THREAD_BYTES = 1 << 20
#: Who seals may have to wait for whoever has bytes in view, who may wait for a check: those have threads of their own, and
#: helpers of their own.
_SEALERS, _CHECKERS = 2, 4

#: Copies a KV into a place and tells its form. None: it is all one part, and there is nothing to be known of it.
Fill: TypeAlias = "Callable[[ByteArray], Form | None]"


@dataclass(slots=True, eq=False)
class Blob:
    """A saved KV; give it back with `free`."""

    label: Label
    bytes: int
    form: Form | None
    at: Span | KvFile = field(repr=False)  #: the store's own
    sealed: Future[Seal] = field(default_factory=Future, repr=False)  #: the store's own

    @property
    def seal(self) -> Seal:
        """Waits for it."""
        return self.sealed.result()

    @property
    def place(self) -> KvPlace:
        return KvPlace.HOST if isinstance(self.at, Span) else KvPlace.DISK


class KvStore:
    def __init__(self, arena: ByteArray, *, pinned: bool, disk: KvDisk | None = None) -> None:
        self.pinned = pinned
        self._arena = KvArena(arena)
        self._disk = disk
        self._sealers = ThreadPoolExecutor(_SEALERS, thread_name_prefix="kv-seal")
        self._checkers = ThreadPoolExecutor(_CHECKERS, thread_name_prefix="kv-check")
        self._seal_helpers, self._check_helpers = start_helpers("kv-seal-help"), start_helpers("kv-check-help")
        self._precedence = Precedence()  #: of checks: somebody waits for them
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

    def write(self, bytes: int, label: Label, fill: Fill, *, to: KvPlace = KvPlace.HOST) -> Blob | None:
        """Take a place, let `fill` copy the KV into it, seal it. None if there is no place, or nothing to keep.

        Done when the KV is copied, in host memory; on disk when it is written.

        What `fill` raises passes on, the place freed. It may not keep the array, nor write or read other blobs meanwhile.
        """
        rest = self.begin(bytes, label, fill, to=to)
        return rest() if rest else None

    def begin(self, bytes: int, label: Label, fill: Fill, *, to: KvPlace = KvPlace.HOST) -> Callable[[], Blob | None] | None:
        """As `write`, as far as `fill` is needed. What is left to do, in any thread: for a disk, the writing."""
        if bytes < 1:
            return None
        if to is KvPlace.HOST:
            blob = self._write_to_host(bytes, label, fill)
            return lambda: blob
        return self._begin_on_disk(bytes, label, fill) if self._disk else None

    def read(self, blob: Blob, label: Label, use: Callable[[ByteArray], T], *, unchecked: bool = False) -> T:
        """What `use` makes of the bytes, which are those that `fill` left. The blob stays.

        Raises DamagedBlob, `use` not called, if label or checksum disagree or the file cannot be read. `use` may not change or
        keep the array, nor write or read other blobs meanwhile. `unchecked`: it may be called while the checksum of a large
        blob in host memory is taken; where DamagedBlob is raised, forget what it made.
        """
        if blob.label != label:
            Seal(blob.label, blob.bytes, 0, ()).require_label(label)
        seal = blob.seal
        with self._open(blob) as payload:
            checked: Future[None] | None = None
            if unchecked and blob.bytes >= _WORTH_A_THREAD_BYTES and blob.place is KvPlace.HOST:
                checked = self._checkers.submit(self._check, seal, payload)
            else:
                seal.require_payload(payload, helpers=self._check_helpers)
            shown = payload.view()
            shown.flags.writeable = False
            try:
                return use(shown)
            finally:
                if checked is not None:
                    checked.result()

    def _check(self, seal: Seal, payload: ByteArray) -> None:
        with self._precedence.first():
            seal.require_payload(payload, helpers=self._check_helpers)

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
            seal = blob.seal
            with closing(self._pieces(span)) as pieces:
                if not self._files.save(file, seal, pieces):
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
        for threads in (self._sealers, self._checkers, self._seal_helpers, self._check_helpers):
            threads.shutdown()
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

    def _write_to_host(self, bytes: int, label: Label, fill: Fill) -> Blob | None:
        span = self._arena.take(bytes)
        if span is None:
            return None
        with ExitStack() as undo:
            undo.callback(self._arena.drop, span)
            with self._arena.open(span) as payload:
                blob = Blob(label, bytes, fill(payload), span)
                if bytes < _WORTH_A_THREAD_BYTES:
                    _seal(blob, payload)
            undo.pop_all()
        if not blob.sealed.done():
            self._arena.hold(span)
            self._sealers.submit(self._seal_later, blob, span)
        return self._entered(blob)

    def _seal_later(self, blob: Blob, span: Span) -> None:
        """Whoever wants to know waits for the seal, so there is one to be had whatever happens, if only an error."""
        try:
            with self._arena.open(span) as payload:
                _seal(blob, payload, helpers=self._seal_helpers, between=self._precedence.give_way)
        except BaseException as error:
            blob.sealed.set_exception(error)
            raise
        finally:
            self._arena.drop(span)

    def _begin_on_disk(self, bytes: int, label: Label, fill: Fill) -> Callable[[], Blob | None] | None:
        file = self._files.take(bytes)
        if file is None:
            return None
        with ExitStack() as undo:
            undo.callback(self._files.release, file)
            try:
                payload = np.empty(bytes, np.uint8)
            except MemoryError:
                return None
            blob = Blob(label, bytes, fill(payload), file)
            undo.pop_all()
        return lambda: self._write_to_disk(blob, file, payload)

    def _write_to_disk(self, blob: Blob, file: KvFile, payload: ByteArray) -> Blob | None:
        with ExitStack() as undo:
            undo.callback(self._files.release, file)
            _seal(blob, payload, helpers=self._seal_helpers)
            if not self._files.save(file, blob.seal, [payload]):
                return None
            undo.pop_all()
        return self._entered(blob)

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


def _seal(blob: Blob, payload: ByteArray, *, helpers: Executor | None = None, between: Callable[[], None] | None = None) -> None:
    if blob.form is not None:
        blob.form = blob.form.packed(payload)
    parts = blob.form.parts if blob.form else None
    blob.sealed.set_result(Seal.of(blob.label, payload, parts, helpers=helpers, between=between))
