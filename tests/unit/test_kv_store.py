"""Saved KV under any order of saves, moves and releases: every blob comes back as it was written, or says that it will not."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from conductor.backend.kv_disk import KvDisk
from conductor.backend.kv_store import Blob, DamagedBlob, KvStore
from conductor.errors import InternalError
from conductor.types import KvPlace
from tests.support.blobs import BUDGET, DISK_BUDGET, LABEL, forbidden, reads_back, save, saved, store_on

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray


# --- any order ----------------------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Each blob has contents of its own: an overlap, a wrong move or another's file would show as somebody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store = store_on(KvDisk(Path(self.directory.name), budget_bytes=DISK_BUDGET))
        self.blobs: dict[Blob, int] = {}
        self.count = 0

    def booked(self, place: KvPlace) -> int:
        return sum(blob.bytes for blob in self.blobs if blob.place is place)

    def any_blob(self, data: st.DataObject) -> Blob:
        return list(self.blobs)[data.draw(st.integers(0, len(self.blobs) - 1))]

    @rule(bytes=st.integers(1, 400), to=st.sampled_from([KvPlace.HOST, KvPlace.HOST, KvPlace.DISK]))
    def save(self, bytes: int, to: KvPlace) -> None:
        self.count += 1
        fits = self.booked(to) + bytes <= (BUDGET if to is KvPlace.HOST else DISK_BUDGET)
        blob = save(self.store, bytes, self.count, to=to)
        assert (blob is not None) == fits, "free bytes suffice, wherever they are"
        if blob is not None:
            assert blob.place is to
            self.blobs[blob] = self.count

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.blobs:
            blob = self.any_blob(data)
            del self.blobs[blob]
            self.store.free(blob)
            with pytest.raises(InternalError):
                self.store.free(blob)

    @rule(data=st.data())
    def move_to_disk(self, data: st.DataObject) -> None:
        if self.blobs:
            blob = self.any_blob(data)
            fits = blob.place is KvPlace.DISK or self.booked(KvPlace.DISK) + blob.bytes <= DISK_BUDGET
            assert self.store.to_disk(blob) == fits
            assert blob.place is (KvPlace.DISK if fits else KvPlace.HOST)

    @invariant()
    def the_books_are_what_the_blobs_take(self) -> None:
        self.store.check()
        assert self.store.used_bytes == self.booked(KvPlace.HOST)
        assert self.store.disk_used_bytes == self.booked(KvPlace.DISK)

    @invariant()
    def every_blob_holds_what_was_written(self) -> None:
        for blob, seed in self.blobs.items():
            assert reads_back(self.store, blob, seed)

    def teardown(self) -> None:
        for blob in self.blobs:
            self.store.free(blob)
        assert (self.store.used_bytes, self.store.disk_used_bytes) == (0, 0)
        assert list(Path(self.directory.name).rglob("*.kv")) == []
        self.store.close()
        self.directory.cleanup()


def test_in_any_order_every_blob_keeps_its_bytes_and_only_full_budgets_refuse() -> None:
    run_state_machine_as_test(AnyOrder, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))


# --- host memory --------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_read_back_and_stays_until_it_is_freed(store: KvStore) -> None:
    blob = saved(store, 300, seed=1)
    assert reads_back(store, blob, 1)
    assert reads_back(store, blob, 1)
    assert store.used_bytes == 300
    store.free(blob)
    assert store.used_bytes == 0


def test_free_bytes_in_pieces_are_moved_together_for_a_blob_that_needs_them(store: KvStore) -> None:
    blobs = [saved(store, 100, seed) for seed in range(10)]
    for blob in blobs[::2]:
        store.free(blob)
    large = saved(store, 500, seed=99)
    assert save(store, 1) is None
    assert reads_back(store, large, 99)
    assert all(reads_back(store, blob, seed) for seed, blob in enumerate(blobs) if seed % 2)


def test_an_arena_of_nothing_holds_nothing() -> None:
    store = store_on(budget=0)
    assert save(store, 1) is None
    assert (store.budget_bytes, store.used_bytes, store.disk_budget_bytes, store.disk_used_bytes) == (0, 0, 0, 0)
    store.check()
    store.close()


def test_a_kv_of_no_bytes_is_not_kept(store: KvStore) -> None:
    assert save(store, 0) is None


def test_a_blob_of_another_store_is_refused() -> None:
    mine, other = store_on(), store_on()
    blob = saved(other, 10)
    saved(mine, 10)
    for act in (mine.free, mine.to_disk, lambda blob: mine.read(blob, LABEL, len)):
        with pytest.raises(InternalError):
            act(blob)


@pytest.mark.parametrize("place", [KvPlace.HOST, KvPlace.DISK])
def test_when_llama_cpp_fails_to_save_the_place_is_free_again(store: KvStore, place: KvPlace) -> None:
    def fail(_: ByteArray) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.write(500, LABEL, fail, to=place)
    assert (store.used_bytes, store.disk_used_bytes) == (0, 0)
    saved(store, 500, to=place)


@pytest.mark.parametrize("place", [KvPlace.HOST, KvPlace.DISK])
def test_what_is_done_with_a_blob_may_fail_and_may_not_change_it(store: KvStore, place: KvPlace) -> None:
    blob = saved(store, 100, seed=3, to=place)
    with pytest.raises(ValueError, match="read-only"):
        store.read(blob, LABEL, lambda bytes: bytes.fill(0))
    assert reads_back(store, blob, 3)


# --- labels and checksums -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [KvPlace.HOST, KvPlace.DISK])
@pytest.mark.parametrize(
    "other",
    [{"model_id": "reviewer"}, {"kv_type": "q8_0"}, {"flash_attention": False}, {"slots": 2}, {"tokens": 8}],
    ids=lambda other: next(iter(other)),
)
def test_a_blob_is_only_for_whom_it_was_saved(store: KvStore, place: KvPlace, other: dict[str, Any]) -> None:
    blob = saved(store, 100, to=place)
    with pytest.raises(DamagedBlob) as refusal:
        store.read(blob, dataclasses.replace(LABEL, **other), forbidden)
    assert next(iter(other)) in refusal.value.problem
    assert reads_back(store, blob, 0), "it is as good as before for whom it was saved"


def test_a_flipped_bit_anywhere_in_host_memory_is_noticed() -> None:
    memory = np.zeros(BUDGET, np.uint8)
    store = KvStore(memory, pinned=False)
    blob = saved(store, 300, seed=5)
    for at in range(300):
        memory[at] ^= 1 << at % 8
        with pytest.raises(DamagedBlob, match="checksum"):
            store.read(blob, LABEL, forbidden)
        memory[at] ^= 1 << at % 8
    assert reads_back(store, blob, 5)


def test_damage_is_not_carried_to_disk_unnoticed(disk: KvDisk) -> None:
    memory = np.zeros(BUDGET, np.uint8)
    store = KvStore(memory, pinned=False, disk=disk)
    blob = saved(store, 300)
    memory[17] ^= 1
    assert store.to_disk(blob)
    with pytest.raises(DamagedBlob, match="checksum"):
        store.read(blob, LABEL, forbidden)
    store.free(blob)


# --- to disk ------------------------------------------------------------------------------------------------------------


def test_a_blob_that_moves_to_disk_is_the_same_blob_and_its_place_is_free(store: KvStore) -> None:
    blob = saved(store, 500, seed=1)
    assert store.to_disk(blob)
    assert (blob.place, store.used_bytes, store.disk_used_bytes) == (KvPlace.DISK, 0, 500)
    saved(store, BUDGET)
    assert reads_back(store, blob, 1)
    store.free(blob)
    assert store.disk_used_bytes == 0


def test_what_exceeds_the_disks_budget_stays_where_it_is(store: KvStore) -> None:
    saved(store, DISK_BUDGET - 99, to=KvPlace.DISK)
    blob = saved(store, 100, seed=1)
    assert not store.to_disk(blob)
    assert save(store, 100, to=KvPlace.DISK) is None
    assert (blob.place, store.used_bytes) == (KvPlace.HOST, 100)
    assert reads_back(store, blob, 1)


def test_without_a_disk_nothing_goes_there() -> None:
    store = store_on()
    blob = saved(store, 100)
    assert not store.to_disk(blob)
    assert save(store, 100, to=KvPlace.DISK) is None
    assert reads_back(store, blob, 0)


def test_what_there_is_no_memory_to_make_is_not_saved(tmp_path: Path) -> None:
    store = store_on(KvDisk(tmp_path, budget_bytes=1 << 62))
    assert store.write(1 << 60, LABEL, forbidden, to=KvPlace.DISK) is None
    assert store.disk_used_bytes == 0
    store.close()
