"""Host memory for the KV of agents that are not live: one arena, allocated once, page-locked on CUDA.

First fit over a sorted list of holes. Saving into memory that was touched before runs at copy speed; fresh or pageable
memory costs several times as much, which is why the arena is reused from its start and never grown.
"""

from __future__ import annotations

from dataclasses import dataclass

from conductor.backend.llama import ByteArray
from conductor.errors import InternalError


@dataclass(frozen=True, slots=True, eq=False)
class Blob:
    """A place in the arena; give it back with `free`."""

    offset: int
    bytes: int


class KvStore:
    def __init__(self, arena: ByteArray, *, pinned: bool) -> None:
        self.pinned = pinned
        self._arena = arena
        self._holes: list[tuple[int, int]] = [(0, arena.nbytes)] if arena.nbytes else []  # (offset, bytes), by offset
        self._blobs: set[Blob] = set()

    @property
    def budget_bytes(self) -> int:
        return int(self._arena.nbytes)

    @property
    def used_bytes(self) -> int:
        return sum(blob.bytes for blob in self._blobs)

    def allocate(self, bytes: int) -> Blob | None:
        """The first hole that is large enough; None if there is none."""
        for i, (offset, size) in enumerate(self._holes):
            if size >= bytes:
                self._holes[i : i + 1] = [(offset + bytes, size - bytes)] if size > bytes else []
                blob = Blob(offset, bytes)
                self._blobs.add(blob)
                return blob
        return None

    def view(self, blob: Blob) -> ByteArray:
        """The blob's bytes, in place."""
        return self._arena[blob.offset : blob.offset + blob.bytes]

    def free(self, blob: Blob) -> None:
        if blob not in self._blobs:
            raise InternalError(f"a blob of {blob.bytes} bytes freed twice")
        self._blobs.discard(blob)
        merged: list[tuple[int, int]] = []
        for offset, size in sorted([*self._holes, (blob.offset, blob.bytes)]):
            if merged and merged[-1][0] + merged[-1][1] == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        self._holes = merged

    def check(self) -> None:
        """Raise InternalError unless blobs and holes tile the arena."""
        edge = 0
        for offset, size in sorted([*self._holes, *((b.offset, b.bytes) for b in self._blobs)]):
            if offset != edge:
                raise InternalError(f"the KV arena has a gap or an overlap at {edge}")
            edge += size
        if edge != self.budget_bytes:
            raise InternalError(f"{edge} of {self.budget_bytes} bytes of the KV arena accounted for")
