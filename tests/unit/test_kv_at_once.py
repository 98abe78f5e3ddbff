"""Saved KV in several hands at once: nobody's bytes move while in view, no place goes to two, and nobody waits for ever."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from conductor.backend import kv_store
from conductor.backend.kv_store import Blob, KvStore
from conductor.errors import InternalError
from conductor.types import KvPlace
from tests.support.blobs import BUDGET, DISK_BUDGET, LABEL, BusyDisk, content, reads_back, save, saved, store_on
from tests.support.eventually import eventually

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray

WORKERS = 6


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


# --- while one moves to disk --------------------------------------------------------------------------------------------


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BusyDisk]:
    monkeypatch.setattr(kv_store, "_PIECE_BYTES", 64)
    disk = BusyDisk(tmp_path, budget_bytes=DISK_BUDGET)
    yield disk
    disk.close()


def test_a_blob_may_be_freed_while_it_moves_to_disk(busy: BusyDisk) -> None:
    store = store_on(busy)
    blob = saved(store, 300)
    busy.meanwhile = lambda: store.free(blob)
    assert not store.to_disk(blob)
    assert (store.used_bytes, store.disk_used_bytes) == (0, 0)


def test_a_move_to_disk_that_breaks_off_leaves_the_blob_where_it_was(busy: BusyDisk) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    store = store_on(busy)
    blob = saved(store, 300, seed=4)
    busy.meanwhile = fail
    with pytest.raises(ZeroDivisionError):
        store.to_disk(blob)
    assert (blob.place, store.used_bytes, store.disk_used_bytes) == (KvPlace.HOST, 300, 0)
    assert reads_back(store, blob, 4)


def test_a_slow_disk_lets_others_move_the_blob_that_it_writes(busy: BusyDisk, pool: ThreadPoolExecutor) -> None:
    store = store_on(busy)
    first, blob, last = saved(store, 300, 1), saved(store, 300, 2), saved(store, 300, 3)
    store.free(first)
    needs_room: list[Future[Blob]] = []

    def begin_a_save_that_needs_a_compaction() -> None:
        needs_room.append(pool.submit(saved, store, 400, 4))
        eventually(lambda: store._arena._gate.waiting == 1, 5)

    busy.meanwhile = begin_a_save_that_needs_a_compaction
    assert store.to_disk(blob)
    assert reads_back(store, needs_room[0].result(5), 4)
    assert reads_back(store, blob, 2)
    assert reads_back(store, last, 3)


def test_a_store_that_closes_while_a_blob_moves_to_disk_leaves_no_file(busy: BusyDisk, tmp_path: Path) -> None:
    store = store_on(busy)
    blob = saved(store, 300)
    busy.meanwhile = store.close
    assert not store.to_disk(blob)
    assert list(tmp_path.iterdir()) == []


# --- several at once ----------------------------------------------------------------------------------------------------


def test_a_blob_may_be_freed_while_it_is_read_and_keeps_its_place_for_the_reader(store: KvStore) -> None:
    blob = saved(store, 300, seed=1)

    def use(place: ByteArray) -> bool:
        store.free(blob)
        assert store.used_bytes == 300
        return place.tobytes() == content(300, 1).tobytes()

    assert store.read(blob, LABEL, use)
    assert store.used_bytes == 0


def test_a_blob_may_move_to_disk_while_it_is_read(store: KvStore, pool: ThreadPoolExecutor) -> None:
    blob = saved(store, 300, seed=1)

    def use(place: ByteArray) -> bool:
        assert pool.submit(store.to_disk, blob).result(5)
        assert (blob.place, store.used_bytes, store.disk_used_bytes) == (KvPlace.DISK, 300, 300)
        return place.tobytes() == content(300, 1).tobytes()

    assert store.read(blob, LABEL, use)
    assert store.used_bytes == 0
    assert reads_back(store, blob, 1)


def test_nothing_moves_under_a_reader(store: KvStore, pool: ThreadPoolExecutor) -> None:
    first, blob = saved(store, 500, 1), saved(store, 300, 2)
    store.free(first)

    def use(place: ByteArray) -> Future[Blob]:
        needs_room = pool.submit(saved, store, 600, 3)
        eventually(lambda: store._arena._gate.waiting == 1, 5)
        assert place.tobytes() == content(300, 2).tobytes()
        return needs_room

    large = store.read(blob, LABEL, use).result(5)
    assert reads_back(store, blob, 2)
    assert reads_back(store, large, 3)


@pytest.mark.parametrize("room", [100, 600], ids=["which there is", "which a compaction would make"])
def test_who_asks_for_room_inside_a_read_is_told_instead_of_waiting_for_itself(store: KvStore, room: int) -> None:
    first, blob = saved(store, 500, 1), saved(store, 300, 2)
    store.free(first)
    with pytest.raises(InternalError, match="wait for itself"):
        store.read(blob, LABEL, lambda _: save(store, room))
    with pytest.raises(InternalError, match="wait for itself"):
        store.read(blob, LABEL, lambda _: store.read(blob, LABEL, len))


def test_so_is_who_asks_for_room_behind_somebody_who_waits_for_it_to_leave(store: KvStore, pool: ThreadPoolExecutor) -> None:
    first, blob = saved(store, 500, 1), saved(store, 300, 2)
    store.free(first)
    waiting: list[Future[Blob]] = []

    def use(_: ByteArray) -> None:
        waiting.append(pool.submit(saved, store, 600, 3))
        eventually(lambda: store._arena._gate.waiting == 1, 5)
        save(store, 1)

    with pytest.raises(InternalError, match="wait for itself"):
        store.read(blob, LABEL, use)
    assert reads_back(store, waiting[0].result(5), 3)


def test_threads_that_save_move_read_and_free_at_once_do_not_meet(store: KvStore, pool: ThreadPoolExecutor) -> None:
    stop = threading.Event()

    def work(worker: int) -> int:
        chance, kept = random.Random(worker), 0
        for n in range(300):
            seed = worker * 1000 + n
            to = KvPlace.DISK if chance.random() < 0.1 else KvPlace.HOST
            blob = save(store, chance.randrange(1, BUDGET // WORKERS), seed, to=to)
            assert blob is not None or to is KvPlace.DISK, "there is room for one of each worker, if nobody takes another's"
            if blob is not None:
                kept += 1
                assert reads_back(store, blob, seed)
                if chance.random() < 0.3:
                    store.to_disk(blob)
                assert reads_back(store, blob, seed)
                store.free(blob)
        return kept

    def watch() -> None:
        while not stop.is_set():
            store.check()

    watching = pool.submit(watch)
    workers = [pool.submit(work, worker) for worker in range(WORKERS)]
    try:
        assert all(worker.result(30) > 100 for worker in workers)
    finally:
        stop.set()
    watching.result(5)
    assert (store.used_bytes, store.disk_used_bytes) == (0, 0)
