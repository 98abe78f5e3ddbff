"""The arena of saved KV under any order of allocations and releases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from conductor.backend.kv_store import Blob, KvStore
from conductor.errors import InternalError

BUDGET = 1000


def store(budget: int = BUDGET) -> KvStore:
    return KvStore(np.zeros(budget, np.uint8), pinned=False)


class AnyOrder(RuleBasedStateMachine):
    """Each blob is filled with a number of its own: an overlap would show as somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.store = store()
        self.blobs: dict[Blob, int] = {}
        self.count = 0

    @rule(bytes=st.integers(1, BUDGET + 1))
    def allocate(self, bytes: int) -> None:
        blob = self.store.allocate(bytes)
        if blob is None:
            assert bytes > max((size for _, size in self.holes()), default=0)
            return
        assert blob.bytes == self.store.view(blob).nbytes == bytes
        self.count = self.count % 255 + 1
        self.blobs[blob] = self.count
        self.store.view(blob)[:] = self.count

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.blobs:
            blob = data.draw(st.sampled_from(sorted(self.blobs, key=lambda blob: blob.offset)))
            del self.blobs[blob]
            self.store.free(blob)
            with pytest.raises(InternalError):
                self.store.free(blob)

    def holes(self) -> list[tuple[int, int]]:
        """(offset, bytes) between the blobs."""
        edges = [(0, 0), *sorted((blob.offset, blob.bytes) for blob in self.blobs), (BUDGET, 0)]
        return [(a + size, b - a - size) for (a, size), (b, _) in itertools.pairwise(edges) if b > a + size]

    @invariant()
    def blobs_and_holes_tile_the_arena(self) -> None:
        self.store.check()
        assert self.store.used_bytes == sum(blob.bytes for blob in self.blobs)

    @invariant()
    def every_blob_holds_what_was_written(self) -> None:
        for blob, number in self.blobs.items():
            assert (self.store.view(blob) == number).all()

    def teardown(self) -> None:
        for blob in self.blobs:
            self.store.free(blob)
        self.store.check()
        assert self.store.used_bytes == 0
        assert self.store.allocate(BUDGET) is not None, "all is free, and yet there is more than one hole"


TestAnyOrder = AnyOrder.TestCase


def test_when_all_is_free_there_is_one_hole_as_large_as_the_arena() -> None:
    arena = store()
    blobs = [arena.allocate(100) for _ in range(10)]
    assert arena.allocate(1) is None
    for n in (3, 1, 9, 0, 5, 2, 8, 4, 7, 6):
        blob = blobs[n]
        assert blob is not None
        arena.free(blob)
    assert arena.allocate(BUDGET) is not None


def test_an_arena_of_nothing_holds_nothing() -> None:
    arena = store(0)
    assert arena.allocate(1) is None
    assert (arena.budget_bytes, arena.used_bytes) == (0, 0)
    arena.check()


def test_a_blob_of_another_arena_cannot_be_freed() -> None:
    mine, other = store(), store()
    blob = other.allocate(10)
    assert blob is not None
    assert mine.allocate(10) is not None
    with pytest.raises(InternalError):
        mine.free(blob)
